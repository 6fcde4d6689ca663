"""What the core adds to the trace of a request: a span of its look-up and of what that waited for, and one of each
of its stores and the writes that follow. Only used while tracing is on; the core's lock guards both classes.

Attributes are named after the glossary (docs/operations.md lists them).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from kvstrata.cache.gate import Decision
from kvstrata.cache.index import Entry, State
from kvstrata.tracing import Attributes, Span, Tracer
from kvstrata.types import Hit, Miss, Namespace, Prefix


class LookupSpan:
    """One look-up, from its first question to its answer."""

    __slots__ = ("_linked", "_span")

    def __init__(
        self, tracer: Tracer, request_id: str, namespace: Namespace, prefix: Prefix, traceparent: str
    ) -> None:
        attributes: Attributes = {
            "kvstrata.request.id": request_id,
            "gen_ai.request.model": namespace.model_name,
            "kvstrata.tokens.asked": prefix.num_tokens,
        }
        self._span = tracer.begin("kvstrata.lookup", attributes, parent=traceparent, kind="server")
        self._linked: set[Span] = set()

    def contained(self, tier: str, held: Sequence[int] | None, seconds: float) -> None:
        """A tier said which of the keys it was asked for it holds; ``held`` is None when it did not."""
        attributes: dict[str, str | int] = {"kvstrata.tier": tier}
        if held is not None:
            attributes |= {"kvstrata.entries": len(held), "kvstrata.entries.held": sum(held)}
        error = "" if held is not None else "the tier is down, or its answer came too late"
        self._span.record("kvstrata.tier.contains", seconds, attributes, kind="client", error=error)

    def decided(self, decisions: Iterable[Decision]) -> None:
        """The gate has decided."""
        for decision in decisions:
            attributes: dict[str, str | int | float | bool] = {
                "kvstrata.tier": decision.tier,
                "kvstrata.gate.verdict": decision.verdict.value,
                "kvstrata.tokens": decision.num_tokens,
                "kvstrata.bytes": decision.num_bytes,
            }
            if decision.load_seconds is not None:
                attributes["kvstrata.gate.load_seconds"] = decision.load_seconds
            if decision.prefill_seconds is not None:
                attributes["kvstrata.gate.prefill_seconds"] = decision.prefill_seconds
            self._span.event("kvstrata.gate", attributes)

    def prefetch(self, tier: str, num_entries: int) -> Span:
        """Reading from a tier begins."""
        return self._span.begin("kvstrata.prefetch", {"kvstrata.tier": tier, "kvstrata.entries": num_entries})

    def waits_for(self, prefetches: Iterable[Span]) -> None:
        """It waits for what other look-ups are reading. Each is linked once, however often this is said."""
        for prefetch in prefetches:
            if prefetch not in self._linked:
                self._linked.add(prefetch)
                self._span.link(prefetch)

    def answered(self, hit: Hit) -> None:
        """The final answer."""
        attributes: dict[str, str | int] = {"kvstrata.tokens.hit": hit.num_tokens}
        for tier, num_tokens in hit.tokens_by_tier.items():
            attributes[f"kvstrata.tokens.hit.{tier}"] = num_tokens
        if hit.miss_reason is not None:
            attributes["kvstrata.miss.reason"] = hit.miss_reason.value
        self._span.end(attributes)

    def abandoned(self) -> None:
        """Nobody waits for the answer any more. Nothing to say once it was given."""
        self._span.end({"kvstrata.abandoned": True})


def read_batch(prefetch: Span, tier: str, outcome: Sequence[Miss | None], seconds: float) -> None:
    """A batch of a prefetch was read."""
    num_missed = sum(miss is not None for miss in outcome)
    attributes: Attributes = {
        "kvstrata.tier": tier,
        "kvstrata.entries": len(outcome),
        "kvstrata.entries.missed": num_missed,
    }
    error = f"{num_missed} entries could not be read" if num_missed else ""
    prefetch.record("kvstrata.tier.read", seconds, attributes, kind="client", error=error)


class StoreSpan:
    """The pieces of one request that were reserved together, from there to their commit; then a span for each tier,
    from the first write that is planned to the end of the last."""

    def __init__(self, tracer: Tracer, namespace: Namespace, shard: int, traceparent: str) -> None:
        attributes: Attributes = {"gen_ai.request.model": namespace.model_name, "kvstrata.shard": shard}
        self._span = tracer.begin("kvstrata.store", attributes, parent=traceparent, kind="server")
        self._num_open = 0
        self._num_tokens = 0
        self._num_bytes = 0
        self._writes: dict[str, _Writes] = {}

    def reserved(self) -> None:
        """A piece got a slot."""
        self._num_open += 1

    def ended(self, entry: Entry) -> None:
        """A piece was committed, or given up. After the last the span ends."""
        if entry.state is State.READY:
            self._num_tokens += entry.num_tokens
            self._num_bytes += entry.payload_bytes
        self._num_open -= 1
        if self._num_open <= 0:
            self._span.end({"kvstrata.tokens": self._num_tokens, "kvstrata.bytes": self._num_bytes})

    def write_planned(self, tier: str) -> None:
        """A tier is to get an entry."""
        self._writes.setdefault(tier, _Writes()).num_left += 1

    def write_ended(self, tier: str, num_bytes: int, *, written: bool) -> None:
        """A tier has it, or not."""
        writes = self._writes[tier]
        writes.num_left -= 1
        writes.num_entries += written
        writes.num_bytes += num_bytes if written else 0
        writes.num_dropped += not written
        if writes.num_left:
            return
        del self._writes[tier]
        attributes: Attributes = {
            "kvstrata.tier": tier,
            "kvstrata.entries": writes.num_entries,
            "kvstrata.entries.dropped": writes.num_dropped,
            "kvstrata.bytes": writes.num_bytes,
        }
        error = "writes were dropped" if writes.num_dropped else ""
        seconds = time.monotonic() - writes.began_at
        self._span.record("kvstrata.tier.write", seconds, attributes, kind="client", error=error)


class _Writes:
    __slots__ = ("began_at", "num_bytes", "num_dropped", "num_entries", "num_left")

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.num_left = self.num_entries = self.num_bytes = self.num_dropped = 0


class StoreSpans:
    """The spans of one reservation, whose pieces may be of several requests."""

    def __init__(self, tracer: Tracer, namespace: Namespace, shard: int, traceparents: Sequence[str]) -> None:
        self._tracer = tracer
        self._namespace = namespace
        self._shard = shard
        self._traceparents = traceparents
        self._by_parent: dict[str, StoreSpan] = {}

    def of(self, position: int) -> StoreSpan:
        """The span of the piece at ``position``, which has got a slot."""
        parent = self._traceparents[position] if self._traceparents else ""
        span = self._by_parent.get(parent)
        if span is None:
            span = StoreSpan(self._tracer, self._namespace, self._shard, parent)
            self._by_parent[parent] = span
        span.reserved()
        return span
