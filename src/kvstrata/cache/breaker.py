"""A circuit breaker: after repeated faults a tier is left alone until a probe succeeds."""

from __future__ import annotations


class Breaker:
    """Closed: operations pass. Open: they are refused at once, and only a background probe may close it.

    Requests never serve as probes: one that hangs would cost that request its deadline. Races between threads
    cost at most one operation more or less, so there is no lock.
    """

    def __init__(self, failures_to_open: int = 2) -> None:
        self.bypassed = False
        """An operator wants the tier left alone, whatever its state."""
        self._tripped = False
        self._failures_to_open = failures_to_open
        self._failures = 0

    @property
    def is_open(self) -> bool:
        """Whether operations are refused."""
        return self._tripped or self.bypassed

    def succeeded(self) -> None:
        self._failures = 0
        self._tripped = False

    def failed(self) -> bool:
        """Count a fault; whether this one opened the breaker."""
        self._failures += 1
        if self._tripped or self._failures < self._failures_to_open:
            return False
        self._tripped = True
        return True

    def stalled(self) -> bool:
        """An operation outlived its deadline: open at once. Whether this opened it."""
        self._failures = self._failures_to_open
        was_tripped, self._tripped = self._tripped, True
        return not was_tripped
