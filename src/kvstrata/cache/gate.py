"""The gate: load or recompute. Nothing is loaded that is measured to load slower than it is recomputed.

Estimates come from what was seen: seconds per byte of a tier's reads (queueing and decoding included) and seconds
per token of the engine's prefill. Without a measurement of both, load: that is how a measurement comes about. An
estimate that says "recompute" is forgotten after ``RETRY_SECONDS``, so that a tier which became fast again is seen.
"""

from __future__ import annotations

_KEPT = 0.7
RETRY_SECONDS = 60.0


class Rate:
    """Seconds per unit: decaying sums, so that large measurements count for more than small ones."""

    __slots__ = ("_seconds", "_units", "measured_at")

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0
        self.measured_at = 0.0

    @property
    def value(self) -> float | None:
        """None before the first measurement."""
        return self._seconds / self._units if self._units else None

    def add(self, units: int, seconds: float, now: float) -> None:
        if units <= 0 or seconds <= 0:
            return
        self._units = _KEPT * self._units + units
        self._seconds = _KEPT * self._seconds + seconds
        self.measured_at = now

    def forget(self) -> None:
        self._units = self._seconds = 0.0


class Gate:
    """Decides per tier how much of a found prefix is worth loading. Guarded by the cache's lock."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._prefill: dict[bytes, Rate] = {}
        self._read: dict[str, Rate] = {}

    def prefilled(self, namespace: bytes, num_tokens: int, seconds: float, now: float) -> None:
        """The engine of ``namespace`` (its fingerprint) computed ``num_tokens`` prompt tokens."""
        self._prefill.setdefault(namespace, Rate()).add(num_tokens, seconds, now)

    def read(self, tier: str, num_bytes: int, seconds: float, now: float) -> None:
        """A tier delivered ``num_bytes`` of payloads, the last of them ``seconds`` after they were asked for."""
        self._read.setdefault(tier, Rate()).add(num_bytes, seconds, now)

    def worth_loading(self, namespace: bytes, tier: str, num_tokens: int, num_bytes: int, now: float) -> bool:
        """Whether reading ``num_bytes`` from ``tier`` is expected to beat computing ``num_tokens``."""
        prefill, read = self._prefill.get(namespace), self._read.get(tier)
        if not self.enabled or prefill is None or read is None or prefill.value is None or read.value is None:
            return True
        if read.value * num_bytes < prefill.value * num_tokens:
            return True
        if now - read.measured_at > RETRY_SECONDS:
            read.forget()
            return True
        return False

    def estimates(self) -> dict[str, float]:
        """Measured rates, for the statistics: bytes/s of each tier, prefill tokens/s."""
        rates = {f"{tier}_bytes_per_second": 1 / r.value for tier, r in self._read.items() if r.value}
        prefill = [r.value for r in self._prefill.values() if r.value]
        if prefill:
            rates["prefill_tokens_per_second"] = 1 / min(prefill)
        return rates
