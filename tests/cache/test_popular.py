"""The prefixes that are hit most: counted in a bounded way, and right where nothing was forgotten."""

from __future__ import annotations

from kvstrata.cache.cache import Cache
from kvstrata.cache.popular import MAX_ENDS
from kvstrata.testing.client import CHUNK_SIZE, Prompt, make_namespace, make_tokens, payload_of, prompt
from kvstrata.testing.core import open_core, store

SPACE = make_namespace()
SYSTEM = make_tokens(2 * CHUNK_SIZE, seed=1)


def put(cache: Cache, stored: Prompt) -> None:
    store(cache, "o", cache.intern(stored.namespace), 0, stored.pieces, payload_of)


def ask(cache: Cache, asked: Prompt, first_token: int = 0) -> int:
    hit = cache.lookup("o", "r", cache.intern(asked.namespace), asked.prefix, first_token)
    cache.release("o", "r")
    assert not hit.pending
    return hit.num_tokens


def conversation(seed: int, length: int = CHUNK_SIZE) -> Prompt:
    return Prompt([*SYSTEM, *make_tokens(length, seed)], SPACE)


def counts(cache: Cache) -> list[tuple[int, int]]:
    return [(prefix.num_tokens, prefix.num_hits) for prefix in cache.popular()]


def test_what_prompts_share_is_counted_once_for_all() -> None:
    with open_core(pool_bytes=4 << 20) as cache:
        assert cache.popular() == []
        for seed in (2, 3, 4):
            put(cache, conversation(seed))
            for _ in range(seed):
                ask(cache, conversation(seed))
        ask(cache, Prompt([*SYSTEM, *make_tokens(CHUNK_SIZE, 5)], SPACE))  # hits the system prompt alone
        shared, *others = counts(cache)
        assert shared == (len(SYSTEM), 2 + 3 + 4 + 1)
        assert others == [(len(SYSTEM) + CHUNK_SIZE, hits) for hits in (4, 3, 2)]
        first = cache.popular()[0]
        assert first.last_piece.chunk_hash == conversation(2).chunks[1].chunk_hash
        assert first.last_hit_at >= max(prefix.last_hit_at for prefix in cache.popular())


def test_a_miss_counts_for_nothing() -> None:
    with open_core(pool_bytes=4 << 20) as cache:
        ask(cache, conversation(2))
        assert counts(cache) == []


def test_what_was_always_continued_is_not_listed() -> None:
    asked = prompt(5 * CHUNK_SIZE + 20, seed=7)
    with open_core(pool_bytes=4 << 20) as cache:
        put(cache, asked)
        ask(cache, asked)
        ask(cache, asked)
        assert counts(cache) == [(len(asked), 2)]


def test_the_same_tokens_with_another_salt_are_another_prefix() -> None:
    with open_core(pool_bytes=4 << 20) as cache:
        for salt in ("", "tenant"):
            asked = Prompt(SYSTEM, SPACE, salt=salt)
            put(cache, asked)
            ask(cache, asked)
        assert counts(cache) == [(len(SYSTEM), 1), (len(SYSTEM), 1)]


def test_a_beginning_that_the_engine_had_itself_once() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with open_core(pool_bytes=4 << 20) as cache:
        put(cache, asked)
        cache.clear()
        store(cache, "o", cache.intern(SPACE), 0, asked.pieces[2:], payload_of)
        assert ask(cache, asked, first_token=2 * CHUNK_SIZE) == len(asked)
        assert counts(cache) == [(len(asked), 1)]
        put(cache, asked)
        ask(cache, asked)
        assert counts(cache) == [(len(asked), 2)]


def test_memory_is_bounded_and_hits_move_to_what_is_shared() -> None:
    """Of many conversations that were hit once each, the shared beginning keeps the count."""
    num_conversations = 3 * MAX_ENDS
    with open_core(pool_bytes=8 << 20) as cache:
        shared = Prompt(SYSTEM, SPACE)
        put(cache, shared)
        for _ in range(5):
            ask(cache, shared)
        for seed in range(num_conversations):
            asked = conversation(100 + seed, length=16)
            put(cache, asked)
            assert ask(cache, asked) == len(asked)
        assert len(cache._popular.ends()) <= MAX_ENDS + 64
        assert counts(cache)[0] == (len(SYSTEM), 5 + num_conversations)
