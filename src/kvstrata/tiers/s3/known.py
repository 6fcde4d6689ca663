"""Keys that were seen a short while ago."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable


class Known:
    """Keys whose objects were there when last looked at. State only; the clock is the caller's. Thread-safe."""

    def __init__(self, seconds: float, max_keys: int) -> None:
        self._seconds = seconds
        self._max_keys = max_keys
        self._lock = threading.Lock()
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, keys: Iterable[str], now: float) -> None:
        """``keys`` were seen at ``now``; the ones longest unseen go when there are too many."""
        if self._seconds <= 0:
            return
        with self._lock:
            for key in keys:
                self._until[key] = now + self._seconds
                self._until.move_to_end(key)
            while len(self._until) > self._max_keys:
                self._until.popitem(last=False)

    def discard(self, keys: Iterable[str]) -> None:
        """``keys`` are gone."""
        with self._lock:
            for key in keys:
                self._until.pop(key, None)

    def unknown(self, keys: Iterable[str], now: float) -> list[str]:
        """Those of ``keys`` that must be looked at, each once."""
        return [key for key in dict.fromkeys(keys) if self._until.get(key, now) <= now]
