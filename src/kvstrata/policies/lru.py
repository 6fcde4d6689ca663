"""``lru``: what was not used for the longest time goes first."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator

from kvstrata.policies.base import EvictionPolicy

_FIRST_BATCH = 8


class LRUPolicy(EvictionPolicy):
    """Keys in the order of their last use. One ordered dict; sizes play no part."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, size: int) -> None:  # noqa: ARG002 - the contract's signature
        self._order[key] = None

    def touched(self, key: bytes) -> None:
        self._order.move_to_end(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:  # noqa: ARG002 - the contract's signature
        del self._order[key]

    def victims(self) -> Iterator[bytes]:
        # A dict that changes cannot be iterated over, so candidates are taken in batches. Those that the
        # caller passed over stay in front or went to the end: ``offered`` skips them. As batches double,
        # walking over them again costs no more in all than walking over everything twice.
        offered: set[bytes] = set()
        batch = _FIRST_BATCH
        while True:
            candidates = (key for key in self._order if key not in offered)
            taken = list(itertools.islice(candidates, batch))
            if not taken:
                return
            for key in taken:
                offered.add(key)
                if key in self._order:
                    yield key
            batch *= 2
