"""Dropping a namespace, or everything, from L1 and the tiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from kvstrata.cache.clears import Clears
from kvstrata.cache.index import Entry, State
from kvstrata.cache.io import TierIO
from kvstrata.cache.l1 import L1
from kvstrata.cache.lookups import Lookup
from kvstrata.types import Namespace

_ENTRIES_AT_ONCE = 1000
"""Dropped under one hold of the lock, which takes a few milliseconds."""


class Clearing:
    """Takes L1's lock itself."""

    def __init__(
        self, l1: L1, tiers: Sequence[TierIO], clears: Clears, lookups: Mapping[tuple[str, str], Lookup]
    ) -> None:
        self._l1 = l1
        self._tiers = tiers
        self._clears = clears
        self._lookups = lookups

    def steps(
        self,
        namespace: Namespace | None,
        *,
        tiers: bool,
        deleted: Callable[[str, int], None] | None,
        ended: Callable[[str], None] | None,
    ) -> Iterator[int]:
        """See ``Cache.clearing``."""
        with self._l1.lock:
            entries = list(self._l1.index.entries.values())
            if tiers:
                self._clears.begin(namespace)
                for lookup in self._lookups.values():
                    if namespace is None or lookup.namespace is namespace:
                        lookup.held_by_tier.clear()
        try:
            for start in range(0, len(entries), _ENTRIES_AT_ONCE):
                yield self._drop(entries[start : start + _ENTRIES_AT_ONCE], namespace)
        finally:  # also when the last steps are not taken: a tier whose clear never ends is of no more use
            if tiers:
                self._clear_tiers(namespace, deleted, ended)

    def _drop(self, entries: Sequence[Entry], namespace: Namespace | None) -> int:
        """Drop those of a namespace that are still held."""
        with self._l1.lock:
            chosen = [e for e in entries if e.state is not State.DROPPED]
            chosen = [e for e in chosen if namespace is None or e.namespace is namespace]
            for entry in chosen:
                self._l1.index.drop(entry)
        return len(chosen)

    def _clear_tiers(
        self,
        namespace: Namespace | None,
        deleted: Callable[[str, int], None] | None,
        ended: Callable[[str], None] | None,
    ) -> None:
        chosen = []
        with self._l1.lock:
            for i, tier in enumerate(self._tiers):
                # Where the tier is away, one clear that waits for its return is enough.
                if ended is None and tier.breaker.is_open and self._clears.is_covered(i, namespace):
                    self._clears.ended(i, namespace)
                else:
                    chosen.append(i)
        prefix = "" if namespace is None else namespace.key_prefix
        for i in chosen:
            tier = self._tiers[i]
            done = partial(self._cleared, i, namespace, ended)
            tier.clear(prefix, done, deleted=None if deleted is None else partial(deleted, tier.name))

    def _cleared(self, tier: int, namespace: Namespace | None, ended: Callable[[str], None] | None) -> None:
        with self._l1.lock:
            self._clears.ended(tier, namespace)
        if ended is not None:
            ended(self._tiers[tier].name)
