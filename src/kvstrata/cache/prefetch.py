"""L2 -> L1 ahead of a retrieve: ask the tiers what they hold, decide what to read, read it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from kvstrata.cache.clears import Clears
from kvstrata.cache.frames import Transfer
from kvstrata.cache.gate import Decision, Gate, Verdict
from kvstrata.cache.index import Entry, State
from kvstrata.cache.io import TierIO
from kvstrata.cache.l1 import L1
from kvstrata.cache.lookups import Lookup
from kvstrata.cache.plan import hold, is_complete, plan_pieces, worth_loading
from kvstrata.cache.walk import Candidates, Walk
from kvstrata.metrics import Metrics
from kvstrata.tracing import Span
from kvstrata.types import Miss, MissReason

Job = Callable[[], None]
"""I/O to do once the lock is released."""


class Prefetch:
    """``begin`` is called with L1's lock held; its jobs without. The rest happens on the threads of the tiers."""

    def __init__(
        self,
        l1: L1,
        tiers: Sequence[TierIO],
        clears: Clears,
        gate: Gate,
        metrics: Metrics,
        *,
        read_fastest: bool,
        clock: Callable[[], float],
    ) -> None:
        """``read_fastest``: what several tiers hold is read from the one measured fastest, not from the first."""
        self._l1 = l1
        self._tiers = tiers
        self._names = [tier.name for tier in tiers]
        self._clears = clears
        self._gate = gate
        self._metrics = metrics
        self._read_fastest = read_fastest
        self._clock = clock
        self._given_up_at: dict[Entry, float] = {}
        """Until when a read under way is worth waiting for. Not by key: an entry that was dropped may have a
        successor that is read too."""
        self._spans: dict[bytes, Span] = {}
        """While tracing is on: the spans of the reads under way, by the entry's key."""

    @property
    def is_possible(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self._tiers) and self._gate.mode != "never"

    def joined(self, lookup: Lookup, loading: Sequence[Entry]) -> None:
        """``lookup`` waits for what another one loads."""
        if lookup.span is not None:
            lookup.span.waits_for(span for entry in loading if (span := self._spans.get(entry.key)))
        self._bound(lookup, lookup.started_at)

    def is_given_up(self, loading: Sequence[Entry], now: float) -> bool:
        """Whether one of these reads takes so long that nobody waits for it any more."""
        return self._gate.mode == "auto" and any(now >= self._given_up_at.get(e, math.inf) for e in loading)

    def _bound(self, lookup: Lookup, since: float) -> None:
        """Let ``lookup`` wait for loads, whoever began them, not longer than computing it all would take."""
        seconds = self._gate.patience_seconds(lookup.namespace.fingerprint, lookup.prefix.num_tokens)
        if seconds is not None:
            lookup.be_patient(seconds, since)

    def begin(self, lookup: Lookup, reached: Walk) -> list[Job]:
        """Ask all tiers at once what they hold beyond ``reached``; nothing to do when none can be asked."""
        lookup.probed = True
        namespace = lookup.namespace
        up = [i for i, tier in enumerate(self._tiers) if not tier.breaker.is_open]
        if len(up) < len(self._tiers):
            lookup.reason = MissReason.TIER_DOWN
        asked = [i for i in up if not self._clears.is_running(i, namespace)]
        if not asked:
            return []
        for shards in reached.entries:
            for entry in shards:
                lookup.lease(entry)
        lookup.candidates = Candidates(namespace, lookup.prefix, reached.next_block)
        lookup.order = self._order(lookup, reached)
        lookup.waiting_for = set(asked)
        expires_at = time.monotonic() + lookup.deadline - self._clock()
        return [
            partial(
                self._tiers[i].contains, lookup.candidates, expires_at, partial(self._answered, lookup, i)
            )
            for i in asked
        ]

    def _order(self, lookup: Lookup, reached: Walk) -> list[int]:
        if not self._read_fastest:
            return list(range(len(self._tiers)))
        num_blocks = lookup.prefix.num_blocks - reached.next_block + bool(lookup.prefix.remainder_hash)
        shard_bytes = max(1, num_blocks) * lookup.namespace.layout.block_bytes
        return self._gate.order(self._names, shard_bytes * lookup.namespace.world_size)

    def _answered(self, lookup: Lookup, tier: int, held: bytes | None, seconds: float) -> None:
        """A tier answered; on its look-up thread, or on the caller's when it is down."""
        with self._l1.lock:
            if held is not None:
                self._gate.answered(self._names[tier], seconds)
            if lookup.span is not None:
                lookup.span.contained(self._names[tier], held, seconds)
            if lookup.is_planned or lookup.hit is not None or lookup.released:
                return
            lookup.waiting_for.discard(tier)
            if held is None:
                lookup.reason = MissReason.TIER_DOWN
            elif not self._clears.is_running(tier, lookup.namespace):
                lookup.held_by_tier[tier] = held
            jobs = self._plan(lookup)
        for job in jobs:
            job()

    def _plan(self, lookup: Lookup) -> list[Job]:
        """Reserve slots for what the tiers hold and is worth loading, once all have answered that matter.

        A tier that is far away does not matter where those before it hold everything.
        """
        pieces = plan_pieces(self._l1.index, lookup)
        if lookup.waiting_for and not is_complete(pieces, lookup):
            return []
        lookup.waiting_for.clear()
        lookup.is_planned = True
        now = self._clock()
        plan, decisions = worth_loading(pieces, lookup, self._gate, self._names, now)
        self._decided(lookup, decisions)
        self._bound(lookup, now)
        reads, no_room = hold(self._l1.index, lookup, plan, self._names)
        lookup.reason = no_room or lookup.reason
        # What is lost with a part of a plan is all that is behind it: the most patient load decides for all.
        waits = [d.patience_seconds for d in decisions if d.verdict is not Verdict.RECOMPUTE]
        if bounded := [seconds for seconds in waits if seconds is not None]:
            self._given_up_at |= dict.fromkeys((read.entry for read in reads), now + max(bounded))
        jobs: list[Job] = []
        for tier in sorted({read.tier for read in reads}):
            mine = [read for read in reads if read.tier == tier]
            transfers = [self._l1.transfer(read.entry, read.piece.tokens_hash) for read in mine]
            entries = {t.key: read.entry for t, read in zip(transfers, mine, strict=True)}
            decision = next(d for d in decisions if d.tier == self._names[tier])
            self._gate.begun(decision, now)
            span = None if lookup.span is None else lookup.span.prefetch(decision.tier, len(mine))
            if span is not None:
                self._spans |= dict.fromkeys((read.entry.key for read in mine), span)
            done = partial(self._loaded, lookup, tier, entries)
            measured = partial(self._measured, lookup, decision, span)
            jobs.append(partial(self._tiers[tier].read, transfers, done, measured, span))
        return jobs

    def _decided(self, lookup: Lookup, decisions: list[Decision]) -> None:
        lookup.decisions = decisions
        if lookup.span is not None:
            lookup.span.decided(decisions)
        for decision in decisions:
            self._metrics.gate_decided(decision.tier, decision.verdict)
            if decision.verdict is Verdict.RECOMPUTE:
                lookup.reason = MissReason.GATED
                self._metrics.gated(decision.tier)

    def _loaded(
        self,
        lookup: Lookup,
        tier: int,
        entries: dict[str, Entry],
        transfers: Sequence[Transfer],
        outcome: Sequence[Miss | None],
    ) -> None:
        """A batch was read; on a read thread of the tier."""
        with self._l1.lock:
            for transfer, miss in zip(transfers, outcome, strict=True):
                entry = entries[transfer.key]
                self._given_up_at.pop(entry, None)
                if lookup.span is not None:
                    self._spans.pop(entry.key, None)
                if miss is None:
                    entry.tiers |= 1 << tier
                    if entry.state is State.LOADING:
                        entry.state = State.READY
                else:
                    lookup.reason = lookup.reason or miss.reason
                    if entry.state is State.LOADING:
                        self._l1.index.drop(entry)
                self._l1.unlease(entry)

    def _measured(
        self, lookup: Lookup, decision: Decision, span: Span | None, num_bytes: int, seconds: float
    ) -> None:
        """A read from a tier has ended."""
        if span is not None:
            span.end({"kvstrata.bytes": num_bytes})
        with self._l1.lock:
            self._gate.read(decision.tier, num_bytes, seconds, self._clock())
            lookup.load_seconds[decision.tier] = seconds
        if num_bytes and decision.load_seconds is not None:
            self._metrics.gate_loaded(decision.tier, decision.load_seconds, seconds)
