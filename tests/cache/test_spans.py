"""What a core adds to the traces of requests, on real threads and over real OTLP."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvstrata.cache.cache import Cache
from kvstrata.errors import TierUnavailable
from kvstrata.hashing import root_hash
from kvstrata.testing.client import CHUNK_SIZE, Prompt, payload_of, prompt
from kvstrata.testing.collector import CollectedSpan, Collector
from kvstrata.testing.core import open_core, settle, wait_lookup
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.base import Tier
from kvstrata.tiers.dict import DictTier
from kvstrata.tracing import open_tracer
from kvstrata.types import Miss, Namespace

A = "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaa-01"
B = "00-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-bbbbbbbbbbbbbbbb-01"
ASKED = prompt(3 * CHUNK_SIZE, seed=1)


class HeldTier(DictTier):
    """Reads wait until they may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.may_read = threading.Event()
        self.may_read.set()

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        assert self.may_read.wait(20)
        return super().read(keys, buffers)


class DownTier(DictTier):
    def contains(self, keys: Sequence[str]) -> list[bool]:
        raise TierUnavailable("no")

    def write(self, keys: Sequence[str], frames: Sequence[bytes | bytearray | memoryview]) -> None:
        raise TierUnavailable("no")


@contextmanager
def traced(*tiers: Tier, **arguments: str) -> Iterator[Cache]:
    """A core whose spans have reached the collector when it is closed."""
    tracer = open_tracer("test", enabled=True)
    assert tracer is not None
    with open_core(tiers, tracer=tracer, **arguments) as cache:
        yield cache
    tracer.close()


def store(cache: Cache, stored: Prompt, traceparents: Sequence[str] = ()) -> None:
    namespace = cache.intern(stored.namespace)
    slots = cache.reserve("o", namespace, 0, stored.pieces, traceparents)
    for piece, slot in zip(stored.pieces, slots, strict=True):
        assert slot is not None
        view = cache.pool[slot.offset : slot.offset + slot.payload_bytes]
        view[:] = payload_of(piece, 0, slot.payload_bytes)
    cache.commit("o", 0, [piece.chunk_hash for piece in stored.pieces])
    settle(cache)


def look(cache: Cache, request_id: str, traceparent: str = A) -> int:
    namespace = cache.intern(ASKED.namespace)
    first = cache.lookup("o", request_id, namespace, ASKED.prefix, 0, traceparent)
    hit = first if not first.pending else wait_lookup(cache, "o", request_id, namespace, ASKED.prefix)
    cache.release("o", request_id)
    return hit.num_tokens


def children(collector: Collector, parent: CollectedSpan) -> list[str]:
    return sorted(span.name for span in collector.spans if span.parent_id == parent.span_id)


def test_a_store_of_two_requests_is_in_the_traces_of_both(collector: Collector) -> None:
    with traced(DictTier(), DictTier()) as cache:
        store(cache, ASKED, (A, A, B))
    first, second = sorted(collector.named("kvstrata.store"), key=lambda span: span.trace_id)
    assert (first.trace_id, first.parent_id, first.kind) == ("a" * 32, "a" * 16, "server")
    assert second.trace_id == "b" * 32
    size = ASKED.namespace.layout.payload_bytes(CHUNK_SIZE)
    assert first.attributes["kvstrata.tokens"] == 2 * CHUNK_SIZE
    assert (second.attributes["kvstrata.tokens"], second.attributes["kvstrata.bytes"]) == (CHUNK_SIZE, size)
    for span, num_entries in ((first, 2), (second, 1)):
        writes = [each for each in collector.named("kvstrata.tier.write") if each.parent_id == span.span_id]
        assert sorted(each.attributes["kvstrata.tier"] for each in writes) == ["tier0", "tier1"]
        assert {each.attributes["kvstrata.entries"] for each in writes} == {num_entries}
        assert {each.attributes["kvstrata.bytes"] for each in writes} == {num_entries * size}
        assert all(each.trace_id == span.trace_id and not each.error for each in writes)


def test_a_look_up_shows_what_it_waited_for(collector: Collector) -> None:
    with traced(DictTier(), DictTier()) as cache:
        store(cache, ASKED)
        cache.clear(tiers=False)
        assert look(cache, "r") == len(ASKED)
        assert look(cache, "s", B) == len(ASKED)
        settle(cache)
    cold, warm = sorted(collector.named("kvstrata.lookup"), key=lambda span: span.trace_id)
    assert (cold.parent_id, cold.kind, cold.attributes["kvstrata.request.id"]) == ("a" * 16, "server", "r")
    assert cold.attributes["kvstrata.tokens.asked"] == cold.attributes["kvstrata.tokens.hit"] == len(ASKED)
    assert cold.attributes["kvstrata.tokens.hit.tier0"] == len(ASKED)
    assert "kvstrata.miss.reason" not in cold.attributes
    assert [(name, said["kvstrata.gate.verdict"]) for name, said in cold.events] == [
        ("kvstrata.gate", "load")
    ]
    assert children(collector, cold).count("kvstrata.prefetch") == 1
    (prefetch,) = collector.named("kvstrata.prefetch")
    size = ASKED.namespace.layout.payload_bytes(CHUNK_SIZE)
    assert prefetch.attributes == {
        "kvstrata.tier": "tier0",
        "kvstrata.entries": 3,
        "kvstrata.bytes": 3 * size,
    }
    reads = collector.named("kvstrata.tier.read")
    assert {span.parent_id for span in reads} == {prefetch.span_id}
    assert sum(span.attributes["kvstrata.entries"] for span in reads) == 3
    assert "tier0" in {span.attributes["kvstrata.tier"] for span in collector.named("kvstrata.tier.contains")}
    assert warm.attributes["kvstrata.tokens.hit.l1"] == len(ASKED)
    assert children(collector, warm) == []


def begin_held_load(cache: Cache, tier: HeldTier) -> Namespace:
    """Look up what only the tier has, which does not deliver it yet."""
    store(cache, ASKED)
    cache.clear(tiers=False)
    tier.may_read.clear()
    namespace = cache.intern(ASKED.namespace)
    assert cache.lookup("o", "r", namespace, ASKED.prefix, 0, A).pending
    wait_until(lambda: cache._prefetch._spans, "its load has begun")
    return namespace


def test_a_look_up_that_waits_for_another_ones_load_is_linked_to_it(collector: Collector) -> None:
    tier = HeldTier()
    with traced(tier) as cache:
        namespace = begin_held_load(cache, tier)
        for _ in range(3):
            assert cache.lookup("o", "s", namespace, ASKED.prefix, 0, B).pending
        tier.may_read.set()
        for request_id in ("r", "s"):
            assert wait_lookup(cache, "o", request_id, namespace, ASKED.prefix).num_tokens == len(ASKED)
            cache.release("o", request_id)
        wait_until(lambda: not cache._prefetch._spans, "nothing is kept of it")
    (prefetch,) = collector.named("kvstrata.prefetch")
    joined = next(span for span in collector.named("kvstrata.lookup") if span.trace_id == "b" * 32)
    assert joined.links == (prefetch.span_id,)


def test_faults_are_errors_and_what_nobody_waits_for_is_abandoned(collector: Collector) -> None:
    with traced(DownTier()) as cache:
        store(cache, ASKED)
        cache.clear(tiers=False)
        assert look(cache, "r") == 0
    (write,) = collector.named("kvstrata.tier.write")
    assert write.error == "writes were dropped"
    assert (write.attributes["kvstrata.entries"], write.attributes["kvstrata.entries.dropped"]) == (0, 3)
    (lookup,) = collector.named("kvstrata.lookup")
    assert lookup.attributes["kvstrata.miss.reason"] == "tier_down"
    assert "kvstrata.abandoned" not in lookup.attributes


def test_what_is_given_up_ends_too(collector: Collector) -> None:
    tier = HeldTier()
    with traced(tier) as cache:
        namespace = begin_held_load(cache, tier)
        cache.release("o", "r")
        other = prompt(2 * CHUNK_SIZE, seed=2)
        cache.reserve("o", namespace, 0, other.pieces, (B, B))
        cache.drop_owner("o")
        tier.may_read.set()
        settle(cache)
    (lookup,) = collector.named("kvstrata.lookup")
    assert lookup.attributes["kvstrata.abandoned"] is True
    given_up = next(span for span in collector.named("kvstrata.store") if span.trace_id == "b" * 32)
    assert given_up.attributes["kvstrata.tokens"] == 0


def test_no_span_says_what_was_asked(collector: Collector) -> None:
    salted = prompt(3 * CHUNK_SIZE, seed=1)
    with traced(DictTier()) as cache:
        store(cache, salted)
        cache.clear(tiers=False)
        look(cache, "r")
        settle(cache)
    secrets = [root_hash(salted.namespace), *(piece.chunk_hash for piece in salted.pieces)]
    sent = b"".join(collector.raw)
    assert sent
    for secret in secrets:
        assert secret not in sent
        assert secret.hex().encode() not in sent


def test_without_a_tracer_nothing_is_sent(collector: Collector) -> None:
    with open_core([DictTier()]) as cache:
        store(cache, ASKED, (A, A, A))
        cache.clear(tiers=False)
        assert look(cache, "r") == len(ASKED)
    assert collector.raw == []
