"""``lru``: what was not used for the longest time goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstrata.policies.base import EvictionPolicy
from kvstrata.policies.order import unoffered


class LRUPolicy(EvictionPolicy):
    """Keys in the order of their last use. One ordered dict; sizes play no part.

    A victim that the caller passes over keeps its place, unless it is touched.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, size: int) -> None:  # noqa: ARG002 - the contract's signature
        self._order[key] = None

    def touched(self, key: bytes) -> None:
        self._order.move_to_end(key)

    def removed(self, key: bytes, *, evicted: bool) -> None:  # noqa: ARG002 - the contract's signature
        del self._order[key]

    def victims(self) -> Iterator[bytes]:
        offered: set[bytes] = set()
        for key in unoffered(self._order, offered):
            offered.add(key)
            yield key
