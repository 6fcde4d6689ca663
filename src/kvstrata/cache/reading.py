"""What the batches of one read from a tier bring."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kvstrata.tracing import Span

Measured = Callable[[int, float], None]
"""Called with the payload bytes that arrived, and the seconds that all of it took."""


class Reading:
    """One read: what its batches have brought so far. Threads may share it."""

    def __init__(self, num_batches: int, measured: Measured, span: Span | None) -> None:
        self.span = span
        self._asked_at = time.monotonic()
        self._num_left = num_batches
        self._num_bytes = 0
        self._measured = measured
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        """A batch has ended; the last one completes the measurement."""
        with self._lock:
            self._num_bytes += num_bytes
            self._num_left -= 1
            is_last = self._num_left == 0
        if is_last:
            self._measured(self._num_bytes, time.monotonic() - self._asked_at)
