"""``isolation: salt``: what belongs to a salt is listed nowhere, and told to nobody else."""

from __future__ import annotations

import msgspec
import pytest

from kvstrata.cache.cache import Cache
from kvstrata.cache.explain import Explanation
from kvstrata.hashing import tokens_hash
from kvstrata.testing.client import CHUNK_SIZE, Prompt, make_namespace, payload_of, prompt
from kvstrata.testing.core import open_core, settle, store, wait_lookup
from kvstrata.tiers.dict import DictTier
from kvstrata.types import Hit

SPACE = make_namespace()


def put(cache: Cache, stored: Prompt) -> None:
    pieces = [
        msgspec.structs.replace(
            p, tokens_hash=tokens_hash(stored.tokens[p.first_token : p.first_token + p.num_tokens])
        )
        for p in stored.pieces
    ]
    store(cache, "o", cache.intern(SPACE), 0, pieces, payload_of)
    settle(cache)


def ask(cache: Cache, asked: Prompt, request_id: str) -> tuple[Hit, Explanation]:
    hit = wait_lookup(cache, "o", request_id, cache.intern(SPACE), asked.prefix)
    cache.release("o", request_id)
    explanation = cache.explain(request_id)
    assert explanation is not None
    return hit, explanation


@pytest.mark.parametrize("isolated", [False, True])
def test_what_another_salt_holds_is_told_only_without_isolation(isolated: bool) -> None:
    mine = prompt(3 * CHUNK_SIZE, 1, SPACE, "mine")
    theirs = Prompt(mine.tokens, SPACE, "theirs")
    common = prompt(CHUNK_SIZE, 2, SPACE)
    with open_core([DictTier()], isolated=isolated) as cache:
        put(cache, theirs)
        put(cache, common)
        ask(cache, theirs, "theirs")
        ask(cache, common, "common")
        hit, _ = ask(cache, mine, "mine")
        assert hit.num_tokens == 0
        put(cache, mine)
        _, explanation = ask(cache, mine, "again")
        assert explanation.reason is None
        explanation = cache.explain("mine")
        assert explanation is not None
        assert [other.differs_in for other in explanation.same_tokens] == ([] if isolated else [("salt",)])
        listed = cache.keys()
        assert SPACE.key(common.pieces[0].chunk_hash, 0) in listed
        assert len(listed) == (1 if isolated else 7)
        recent = [explanation.request_id for explanation in cache.recent(10)]
        assert recent == (["common"] if isolated else ["again", "mine", "common", "theirs"])
        tokens = sorted(prefix.num_tokens for prefix in cache.popular())
        assert tokens == ([CHUNK_SIZE] if isolated else [CHUNK_SIZE, 3 * CHUNK_SIZE, 3 * CHUNK_SIZE])


def test_an_answer_is_the_same_whatever_another_salt_holds() -> None:
    """Also where it is missed in the middle, in L1 or in a tier."""
    mine = prompt(4 * CHUNK_SIZE + 5, 1, SPACE, "mine")
    start = Prompt(mine.tokens[: 2 * CHUNK_SIZE], SPACE, "mine")
    answers = []
    for with_others in (False, True):
        with open_core([DictTier()], isolated=True) as cache:
            put(cache, start)
            if with_others:
                put(cache, Prompt(mine.tokens, SPACE, "theirs"))
                put(cache, Prompt(mine.tokens, SPACE))
            for from_tier in (False, True):
                if from_tier:
                    cache.clear(tiers=False)
                hit, explanation = ask(cache, mine, f"r{from_tier}")
                said = msgspec.structs.replace(explanation, answered_at=0.0, seconds=0.0, load_seconds={})
                answers.append(
                    (hit.num_tokens, hit.tokens_by_tier, hit.miss_reason, said.ranges, said.detail)
                )
    assert answers[:2] == answers[2:]
