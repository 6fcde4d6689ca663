"""What the disk tier knows of its files."""

from __future__ import annotations

import threading
from collections import OrderedDict

TOUCH_SECONDS = 60.0
"""Times of use are written to a file at most this often; they order evictions after a restart."""


class Index:
    """Sizes of the files known, in the order of their last use. State only: no I/O. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._used = 0
        self._reserved = 0

    def reserve(self, size: int) -> list[str]:
        """Set ``size`` bytes aside; return the keys to delete for it, which are no longer in the index."""
        with self._lock:
            self._reserved += size
            return self._take(self._used + self._reserved - self.max_bytes)

    def unreserve(self, size: int) -> None:
        """Give back what ``reserve`` set aside."""
        with self._lock:
            self._reserved -= size

    def evict(self, size: int) -> list[str]:
        """Take the least recently used keys of at least ``size`` bytes out; return them."""
        with self._lock:
            return self._take(size)

    def _take(self, size: int) -> list[str]:
        victims = []
        while size > 0 and self._entries:
            key, (held, _) = self._entries.popitem(last=False)
            self._used -= held
            size -= held
            victims.append(key)
        return victims

    def used(self, key: str, size: int, now: float) -> bool:
        """``key`` of ``size`` bytes was read or written; True when its last noted use is long ago."""
        with self._lock:
            held, noted = self._entries.pop(key, (0, 0.0))
            stale = now - noted > TOUCH_SECONDS
            self._entries[key] = (size, now if stale else noted)
            self._used += size - held
            return stale

    def removed(self, key: str) -> bool:
        """``key`` has no file any more; True when it was thought to have one."""
        with self._lock:
            held = self._entries.pop(key, None)
            if held is None:
                return False
            self._used -= held[0]
            return True

    def size(self, key: str) -> int | None:
        """Bytes of ``key`` as last seen."""
        held = self._entries.get(key)
        return None if held is None else held[0]

    def keys(self) -> list[str]:
        """All keys, least recently used first."""
        with self._lock:
            return list(self._entries)

    def totals(self) -> tuple[int, int]:
        """Number of entries and their bytes."""
        with self._lock:
            return len(self._entries), self._used
