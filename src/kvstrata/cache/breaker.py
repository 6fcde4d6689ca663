"""A circuit breaker: after repeated faults a tier is left alone until a probe succeeds."""

from __future__ import annotations

FAILURES_TO_OPEN = 2
PROBE_SECONDS = 1.0
"""Pause between probes while open: a recovered tier is used again within about this time."""


class Breaker:
    """Closed: operations pass. Open: they are refused at once, and only a background probe may close it.

    Requests never serve as probes: one that hangs would cost that request its deadline. Not thread-safe by
    itself; reads of ``is_open`` may race, which costs at most one operation.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._failures = 0

    def succeeded(self) -> None:
        self._failures = 0
        self.is_open = False

    def failed(self) -> bool:
        """Count a fault; whether this one opened the breaker."""
        self._failures += 1
        if self.is_open or self._failures < FAILURES_TO_OPEN:
            return False
        self.is_open = True
        return True

    def stalled(self) -> bool:
        """An operation outlived its deadline: open at once. Whether this opened it."""
        self._failures = FAILURES_TO_OPEN
        was_open, self.is_open = self.is_open, True
        return not was_open
