"""Which tier gets an entry, and when: the write policies.

A **use** of an entry is a store of it, or a look-up that is answered with it. A tier whose policy is ``all`` gets
an entry with its first use, one with ``second_use`` with its second; both wherever the entry came from, so that
what is found in one tier reaches the others that want it and lack it. Nothing is remembered for that beyond the
entry in L1: what has left L1 before its second use is not written.

A store is new and goes first. A write that a look-up asks for is only taken while the tier's queue is less than
half full and nothing was dropped lately, and is left out when the tier turns out to hold the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvstrata.cache.clears import Clears
from kvstrata.cache.frames import Transfer
from kvstrata.cache.gate import Gate
from kvstrata.cache.index import Entry, State
from kvstrata.cache.io import TierIO
from kvstrata.cache.l1 import L1
from kvstrata.cache.spans import StoreSpan

Job = Callable[[], None]
"""I/O to do once the lock is released."""


class Writes:
    """Plans writes to the tiers. ``stored`` and ``used`` are called with L1's lock held; their jobs without."""

    def __init__(
        self, l1: L1, tiers: Sequence[TierIO], clears: Clears, gate: Gate, clock: Callable[[], float]
    ) -> None:
        self._l1 = l1
        self._gate = gate
        self._clock = clock
        self._tiers = tiers
        self._clears = clears
        self._at_first = _mask(tiers, {"all"})
        self._at_second = _mask(tiers, {"all", "second_use"})

    def stored(
        self, entry: Entry, transfer: Transfer, *, again: bool = False, span: StoreSpan | None = None
    ) -> list[Job]:
        """``entry`` was stored, or was to be stored ``again`` while it is held."""
        lacking = (self._at_second if again else self._at_first) & ~entry.tiers
        return [self._plan(i, entry, transfer, spare=False, span=span) for i in self._open(lacking, entry)]

    def used(self, entries: Iterable[Entry]) -> list[Job]:
        """A look-up is answered with ``entries``."""
        if not self._at_second:
            return []
        lacking = [entry for entry in entries if self._at_second & ~entry.tiers]
        if not lacking:
            return []
        spare = sum(1 << i for i, tier in enumerate(self._tiers) if tier.has_spare_room())
        jobs: list[Job] = []
        for entry in lacking:
            tiers = self._open(self._at_second & ~entry.tiers & spare, entry)
            if tiers and entry.state is State.READY:
                transfer = self._l1.transfer(entry)
                jobs += [self._plan(i, entry, transfer, spare=True) for i in tiers]
        return jobs

    def _open(self, mask: int, entry: Entry) -> list[int]:
        """The tiers of ``mask`` that are not being cleared of this entry."""
        if not mask:
            return []
        return [
            i
            for i in range(len(self._tiers))
            if mask & (1 << i) and not self._clears.is_running(i, entry.namespace)
        ]

    def _plan(
        self, tier: int, entry: Entry, transfer: Transfer, *, spare: bool, span: StoreSpan | None = None
    ) -> Job:
        """Lease the entry for one write."""
        entry.tiers |= 1 << tier
        entry.leases += 1
        if span is not None:
            span.write_planned(self._tiers[tier].name)
        return partial(self._write, tier, entry, transfer, self._clears.count, spare=spare, span=span)

    def _write(
        self,
        tier: int,
        entry: Entry,
        transfer: Transfer,
        num_clears: int,
        *,
        spare: bool,
        span: StoreSpan | None,
    ) -> None:
        """Queue a write that was planned after so many clears; it may be queued later than a clear or a deletion
        that it preceded."""

        def is_wanted() -> bool:
            is_deleted = not entry.tiers & (1 << tier)  # it was set when the write was planned
            return not is_deleted and not self._clears.since(entry.namespace, num_clears)

        write = self._tiers[tier].fill if spare else self._tiers[tier].write
        if not write(transfer, partial(self._written, tier, entry, span), is_wanted):
            self._written(tier, entry, span, False, 0.0)

    def _written(
        self, tier: int, entry: Entry, span: StoreSpan | None, written: bool, seconds: float
    ) -> None:
        """A tier has it, or not; on the tier's write thread, or on the caller's when the write was not taken."""
        with self._l1.lock:
            if written:
                self._gate.wrote(self._tiers[tier].name, entry.payload_bytes, seconds, self._clock())
            if span is not None:
                span.write_ended(self._tiers[tier].name, entry.payload_bytes, written=written)
            if not written:
                entry.tiers &= ~(1 << tier)
            self._l1.unlease(entry)


def _mask(tiers: Sequence[TierIO], policies: set[str]) -> int:
    return sum(1 << i for i, tier in enumerate(tiers) if tier.write_policy in policies)
