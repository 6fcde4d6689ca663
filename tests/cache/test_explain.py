"""Explained look-ups: every token of a prompt is in one range, and the range says the truth."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from unittest.mock import MagicMock

import msgspec
import pytest

from kvstrata.cache.cache import Cache
from kvstrata.cache.explain import Explanation, TokenRange
from kvstrata.cache.recent import MAX_RECENT
from kvstrata.errors import TierUnavailable
from kvstrata.hashing import tokens_hash
from kvstrata.testing.client import CHUNK_SIZE, Prompt, make_namespace, payload_of, prompt
from kvstrata.testing.core import open_core, settle, store, wait_lookup
from kvstrata.testing.faults import Faults, FaultyTier
from kvstrata.tiers.dict import DictTier
from kvstrata.types import MissReason, Namespace

POOL_BYTES = 4 << 20


def put(cache: Cache, stored: Prompt) -> None:
    """Store as a connector does: pieces know the hash of their tokens."""
    namespace = cache.intern(stored.namespace)
    pieces = [
        msgspec.structs.replace(
            piece,
            tokens_hash=tokens_hash(stored.tokens[piece.first_token : piece.first_token + piece.num_tokens]),
        )
        for piece in stored.pieces
    ]
    for shard in range(namespace.world_size):
        store(cache, "o", namespace, shard, pieces, payload_of)
    settle(cache)


def ask(cache: Cache, asked: Prompt, request_id: str = "r", first_token: int = 0) -> Explanation:
    namespace = cache.intern(asked.namespace)
    while cache.lookup("o", request_id, namespace, asked.prefix, first_token).pending:
        time.sleep(0.0005)
    cache.release("o", request_id)
    settle(cache)
    explanation = cache.explain(request_id)
    assert explanation is not None
    check(explanation, asked)
    return explanation


def check(explanation: Explanation, asked: Prompt) -> None:
    """The ranges are the prompt, in order, without gap; neighbours differ."""
    at = 0
    for each in explanation.ranges:
        assert each.first_token == at
        assert each.num_tokens > 0
        at += each.num_tokens
        assert (each.state == "hit") == (each.tier is not None)
        assert (each.state == "miss") == (each.reason is not None)
    assert at == len(asked)
    kinds = [(r.state, r.tier, r.reason, r.held_by) for r in explanation.ranges]
    assert all(kind != following for kind, following in itertools.pairwise(kinds))
    assert (explanation.reason is None) == all(r.state != "miss" for r in explanation.ranges)


def brief(explanation: Explanation) -> list[tuple[int, str]]:
    return [(r.num_tokens, r.tier or r.reason or r.state) for r in explanation.ranges]


def test_a_full_hit_says_from_where() -> None:
    asked = prompt(6 * CHUNK_SIZE + 20, seed=1)
    with open_core([DictTier()], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        assert brief(ask(cache, asked)) == [(len(asked), "l1")]
        entries = list(cache.index.entries.values())
        for entry in entries:
            if entry.first_token >= 4 * CHUNK_SIZE:
                cache.index.drop(entry)
        explanation = ask(cache, asked)
        assert brief(explanation) == [(4 * CHUNK_SIZE, "l1"), (2 * CHUNK_SIZE + 20, "tier0")]
        assert explanation.detail == "all of it is held"
        assert explanation.load_seconds["tier0"] > 0
        assert explanation.decisions[0].tier == "tier0"


def test_what_the_engine_has_is_not_a_miss() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with open_core([DictTier()], pool_bytes=POOL_BYTES) as cache:
        explanation = ask(cache, asked, first_token=2 * CHUNK_SIZE + 3)
        assert brief(explanation) == [(2 * CHUNK_SIZE, "engine"), (2 * CHUNK_SIZE, "absent")]
        assert "token 128" in explanation.detail


def test_absent_says_how_far_the_nearest_prefix_reaches_and_what_a_tier_holds_beyond() -> None:
    asked = prompt(6 * CHUNK_SIZE, seed=1)
    tier = DictTier()
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        tier.delete([asked.namespace.key(asked.pieces[2].chunk_hash, 0)])
        cache.clear(tiers=False)
        explanation = ask(cache, asked)
        assert brief(explanation) == [
            (2 * CHUNK_SIZE, "tier0"),
            (CHUNK_SIZE, "absent"),
            (3 * CHUNK_SIZE, "absent"),
        ]
        assert [r.held_by for r in explanation.ranges] == [(), (), ("tier0",)]
        assert explanation.num_hit_tokens == 2 * CHUNK_SIZE
        assert (
            explanation.detail
            == "the nearest stored prefix ends at token 128; what follows is not in l1, tier0"
        )


def test_evicted() -> None:
    with open_core(pool_bytes=1 << 20) as cache:
        asked = prompt(10 * CHUNK_SIZE, seed=1)
        put(cache, asked)
        for seed in range(2, 10):
            put(cache, prompt(10 * CHUNK_SIZE, seed=seed))
        explanation = ask(cache, asked)
        assert explanation.reason is MissReason.EVICTED
        assert "was evicted" in explanation.detail


def test_another_chunk_in_its_place() -> None:
    """The prompt ends inside a chunk that another one filled."""
    stored = prompt(4 * CHUNK_SIZE, seed=1)
    asked = Prompt(stored.tokens[: 2 * CHUNK_SIZE + 30], stored.namespace)
    with open_core([DictTier()], pool_bytes=POOL_BYTES) as cache:
        put(cache, stored)
        explanation = ask(cache, asked)
        assert brief(explanation) == [(2 * CHUNK_SIZE, "l1"), (30, "chunk_alignment")]
        assert ask(cache, prompt(30, seed=7)).reason is MissReason.ABSENT


@pytest.mark.parametrize(
    ("faults", "reason", "words"),
    [
        (Faults(error_rate=1.0), MissReason.TIER_DOWN, "tier0"),
        (Faults(delay_seconds=0.3), MissReason.DEADLINE, "tier0"),
        (Faults(flipped_rate=1.0), MissReason.CORRUPT, "corrupt"),
    ],
)
def test_faults_of_tiers(faults: Faults, reason: MissReason, words: str) -> None:
    tier = FaultyTier(DictTier())
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES, lookup_timeout_seconds=0.1) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        tier.faults = faults
        explanation = ask(cache, asked)
        assert {r.reason for r in explanation.ranges if r.state == "miss"} == {reason}
        assert words in explanation.detail


def test_gated_shows_its_grounds() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with open_core([DictTier()], pool_bytes=POOL_BYTES, gate="auto") as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        cache.gate.read("tier0", 1, 1000.0, 0.0)
        cache.gate._tiers["tier0"].measured_at = time.monotonic()
        cache.report_prefill(cache.intern(asked.namespace), 1000, 1.0)
        explanation = ask(cache, asked)
        assert brief(explanation) == [(len(asked), "gated")]
        assert explanation.ranges[0].held_by == ("tier0",)
        (decision,) = explanation.decisions
        assert decision.verdict == "recompute"
        assert decision.load_seconds is not None
        assert decision.prefill_seconds is not None
        assert decision.load_seconds > decision.prefill_seconds
        assert explanation.load_seconds == {}


@pytest.mark.parametrize("differs", ["salt", "model_fingerprint", "prefix"])
def test_the_same_tokens_elsewhere(differs: str) -> None:
    namespace = make_namespace()
    asked = prompt(3 * CHUNK_SIZE, seed=1, namespace=namespace)
    other: Prompt
    match differs:
        case "salt":
            other = Prompt(asked.tokens, namespace, salt="tenant")
        case "model_fingerprint":
            other = Prompt(asked.tokens, msgspec.structs.replace(namespace, model_fingerprint="fine-tuned"))
        case _:
            other = Prompt([1] * CHUNK_SIZE + asked.tokens, namespace)
    with open_core(pool_bytes=POOL_BYTES) as cache:
        put(cache, other)
        assert ask(cache, asked).same_tokens == (), "the server does not know tokens, only their hashes"
        put(cache, asked)  # as the request does that has missed
        explanation = cache.explain("r")
        assert explanation is not None
        (found,) = explanation.same_tokens
        assert found.differs_in == (differs,)
        position = 1 if differs == "prefix" else 0
        assert found.key == other.namespace.key(other.pieces[position].chunk_hash, 0)
        assert found.first_token == position * CHUNK_SIZE


def test_several_shards() -> None:
    namespace: Namespace = make_namespace(world_size=2)
    asked = prompt(4 * CHUNK_SIZE + 5, seed=1, namespace=namespace)
    tier = DictTier()
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        tier.delete([namespace.key(asked.pieces[1].chunk_hash, 1)])
        cache.clear(tiers=False)
        explanation = ask(cache, asked)
        assert [(r.num_tokens, r.held_by) for r in explanation.ranges] == [
            (CHUNK_SIZE, ()),
            (CHUNK_SIZE, ()),
            (2 * CHUNK_SIZE, ("tier0",)),
            (5, ()),
        ]


def test_what_tiers_said_takes_a_byte_for_each_key() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1, namespace=make_namespace(world_size=2))
    with open_core([DictTier(), DictTier()], pool_bytes=POOL_BYTES) as cache:
        ask(cache, asked)
        lookup = cache._recent.find("r")
        assert lookup is not None
        answers = [len(memoryview(held).tobytes()) for held in lookup.held_by_tier.values()]
        assert answers == [2 * asked.prefix.num_blocks] * 2


def test_lookups_need_not_wait_until_all_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompt(CHUNK_SIZE, seed=1)
    with open_core(pool_bytes=POOL_BYTES) as cache:
        namespace = cache.intern(asked.namespace)
        for number in range(5):
            wait_lookup(cache, "o", f"r{number}", namespace, asked.prefix)
        lock = MagicMock(wraps=cache._lock)
        lock.__enter__.side_effect = cache._lock.__enter__
        lock.__exit__.side_effect = cache._lock.__exit__
        monkeypatch.setattr(cache, "_lock", lock)
        assert len(cache.recent(5)) == 5
        assert lock.__enter__.call_count == 1 + 5


def test_the_ring_is_bounded_and_finds_by_the_engines_id() -> None:
    with open_core(pool_bytes=POOL_BYTES) as cache:
        asked = prompt(CHUNK_SIZE, seed=1)
        namespace = cache.intern(asked.namespace)
        for number in range(MAX_RECENT + 50):
            wait_lookup(cache, "o", f"cmpl-{number}-0#1", namespace, asked.prefix)
        wait_lookup(cache, "o", "cmpl-300-0#2", namespace, asked.prefix)
        assert len(cache.recent(1000)) == MAX_RECENT
        assert [each.request_id for each in cache.recent(2)] == ["cmpl-300-0#2", "cmpl-305-0#1"]
        assert cache.explain("cmpl-3") is None
        found = cache.explain("cmpl-300")
        assert found is not None
        assert found.request_id == "cmpl-300-0#2"


class DeafTier(DictTier):
    def contains(self, keys: Sequence[str]) -> list[bool]:
        raise TierUnavailable("no")


def test_one_tier_is_down_and_another_answers() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with open_core([DeafTier(), DictTier()], pool_bytes=POOL_BYTES, probe_seconds=60) as cache:
        for _ in range(3):
            explanation = ask(cache, asked)
            assert explanation.reason is MissReason.TIER_DOWN
            assert explanation.detail == "down, or it failed: tier0"
            assert explanation.ranges == (TokenRange(0, len(asked), "miss", reason=MissReason.TIER_DOWN),)
