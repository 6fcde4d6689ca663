"""``s3fifo``: three FIFO queues; what is used once only goes soon.

Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvstrata.policies.base import EvictionPolicy
from kvstrata.policies.order import unoffered

_SMALL_SHARE = 0.1
_MAX_USES = 3
_USES_TO_STAY = 2
_SIZE_SHIFT = 2  # a held key's value is its size << 2 | its uses, one int instead of a tuple


class S3FIFOPolicy(EvictionPolicy):
    """New keys enter the small queue, a tenth of the bytes held. Those used twice while in it move on to the
    main queue, which gives each key another round per use; the others leave, and are remembered as ghosts:
    a ghost that comes back enters the main queue at once.

    Victims are wanted when the tier is full, so the bytes held stand for the tier's capacity. Ghosts stand
    for as many bytes as the main queue may hold. A victim that the caller passes over keeps its place.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._small_bytes = 0
        self._main_bytes = 0
        # Hash of a key -> its size. A collision costs one misplaced key; the keys themselves would cost more.
        self._ghosts: OrderedDict[int, int] = OrderedDict()
        self._ghost_bytes = 0

    def added(self, key: bytes, size: int) -> None:
        ghost = self._ghosts.pop(hash(key), None)
        if ghost is None:
            self._small[key] = size << _SIZE_SHIFT
            self._small_bytes += size
        else:
            self._ghost_bytes -= ghost
            self._main[key] = size << _SIZE_SHIFT
            self._main_bytes += size

    def touched(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        value = queue[key]
        if value & _MAX_USES < _MAX_USES:
            queue[key] = value + 1

    def removed(self, key: bytes, *, evicted: bool) -> None:
        value = self._small.pop(key, None)
        if value is None:
            self._main_bytes -= self._main.pop(key) >> _SIZE_SHIFT
        else:
            size = value >> _SIZE_SHIFT
            self._small_bytes -= size
            if evicted:
                self._remember(key, size)

    def victims(self) -> Iterator[bytes]:
        offered: set[bytes] = set()
        small, main = unoffered(self._small, offered), unoffered(self._main, offered)
        while True:
            held_bytes = self._small_bytes + self._main_bytes
            if self._small_bytes >= _SMALL_SHARE * held_bytes:
                key = self._next_small(small) or self._next_main(main)
            else:
                key = self._next_main(main) or self._next_small(small)
            if key is None:
                # What was promoted after its walk had ended is still to come.
                main = unoffered(self._main, offered)
                key = self._next_main(main)
            if key is None:
                return
            offered.add(key)
            yield key

    def _next_small(self, keys: Iterator[bytes]) -> bytes | None:
        """The first of ``keys`` of the small queue that was used too little; the others are promoted."""
        for key in keys:
            value = self._small[key]
            if value & _MAX_USES < _USES_TO_STAY:
                return key
            size = value >> _SIZE_SHIFT
            del self._small[key]
            self._small_bytes -= size
            self._main[key] = size << _SIZE_SHIFT
            self._main_bytes += size
        return None

    def _next_main(self, keys: Iterator[bytes]) -> bytes | None:
        """The first of ``keys`` of the main queue that is unused; used ones go round once per use."""
        for key in keys:
            value = self._main[key]
            if value & _MAX_USES == 0:
                return key
            self._main[key] = value - 1
            self._main.move_to_end(key)
        return None

    def _remember(self, key: bytes, size: int) -> None:
        ghost = hash(key)
        self._ghost_bytes += size - self._ghosts.pop(ghost, 0)
        self._ghosts[ghost] = size
        room = (1 - _SMALL_SHARE) * (self._small_bytes + self._main_bytes)
        while self._ghosts and self._ghost_bytes > room:
            _, dropped = self._ghosts.popitem(last=False)
            self._ghost_bytes -= dropped
