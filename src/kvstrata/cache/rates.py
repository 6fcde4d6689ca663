"""What the gate has measured: of an engine, and of a tier. State only; guarded by the core's lock."""

from __future__ import annotations

_KEPT = 0.7
_LEAST_TRANSFER_SHARE = 0.1
"""Of the seconds of a read: the latency is an estimate too, and may be too high."""


class Rate:
    """Seconds per unit: decaying sums, so that large measurements count for more than small ones."""

    __slots__ = ("_seconds", "_units")

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0

    @property
    def value(self) -> float | None:
        """None before the first measurement."""
        return self._seconds / self._units if self._units else None

    def is_typical(self, units: int) -> bool:
        """Whether so many units are no small measurement, next to those before."""
        return units >= (1 - _KEPT) * self._units / 2

    def restart(self) -> None:
        """Forget what was measured."""
        self._units = self._seconds = 0.0

    def correct(self, value: float) -> None:
        """Another value, of the same weight."""
        self._seconds = value * self._units

    def add(self, units: int, seconds: float) -> bool:
        """Take a measurement in; False when it is none."""
        if units <= 0 or seconds <= 0:
            return False
        self._units = _KEPT * self._units + units
        self._seconds = _KEPT * self._seconds + seconds
        return True


class _Busy:
    """Loads of a tier that overlap, from when there was one to when there is none."""

    __slots__ = ("num_begun", "num_bytes", "num_left", "per_byte", "since")

    def __init__(self, since: float, per_byte: float | None) -> None:
        """``per_byte``: the estimate as it was; None: there was none."""
        self.since = since
        self.per_byte = per_byte
        self.num_begun = 0
        self.num_left = 0
        self.num_bytes = 0


class TierRates:
    """Of one tier."""

    __slots__ = ("busy", "free_at", "latency", "measured_at", "reads", "tried_at", "writes")

    def __init__(self) -> None:
        self.latency = Rate()
        self.reads = Rate()
        self.writes = Rate()
        self.measured_at = 0.0
        self.tried_at: float | None = None
        """Since when a trial is under way."""
        self.free_at = 0.0
        """When the loads that were begun have ended, if they take what was estimated."""
        self.busy: _Busy | None = None

    def transfer_seconds(self, seconds: float) -> float:
        """What exceeds the latency is the transfer's."""
        return max(seconds - (self.latency.value or 0.0), _LEAST_TRANSFER_SHARE * seconds)

    def add(self, rate: Rate, num_bytes: int, seconds: float, now: float) -> None:
        """Take a read or a write in."""
        if rate.add(num_bytes, self.transfer_seconds(seconds)):
            self.measured_at = now

    def begin(self, now: float) -> None:
        """A load begins."""
        if self.busy is None:
            self.busy = _Busy(now, self.reads.value)
        self.busy.num_begun += 1
        self.busy.num_left += 1

    def end(self, num_bytes: int, now: float) -> None:
        """A load has ended. With the last one of several, what they waited for each other is taken out of the
        estimate: it says nothing about a load that is alone.

        What one of them would have taken alone is between what all took together, for each of their bytes, and what
        was measured of each. The estimate from before is kept as far as that allows.
        """
        busy = self.busy
        if busy is None:
            return
        busy.num_left -= 1
        busy.num_bytes += num_bytes
        if busy.num_left:
            return
        self.busy = None
        if busy.num_begun > 1 and busy.num_bytes and self.reads.value is not None:
            least = self.transfer_seconds(now - busy.since) / busy.num_bytes
            self.reads.correct(min(max(least, busy.per_byte or 0.0), self.reads.value))

    def load_seconds(self, per_byte: float | None, num_bytes: int) -> float | None:
        return None if per_byte is None else (self.latency.value or 0.0) + per_byte * num_bytes
