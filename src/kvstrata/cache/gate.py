"""The gate: load or recompute. Nothing is loaded that is measured to load slower than it is recomputed.

Estimates are exponentially weighted means of what was seen: seconds per byte of a tier's reads (queueing and
decoding included) and seconds per token of the engine's prefill. Without a measurement of both, load: that is
how a measurement comes about. An estimate that says "recompute" is forgotten after ``RETRY_SECONDS``, so that a
tier which became fast again is seen.
"""

from __future__ import annotations

_WEIGHT = 0.3
RETRY_SECONDS = 60.0


class Rate:
    """Seconds per unit, as an exponentially weighted mean. ``value`` is None before the first measurement."""

    __slots__ = ("measured_at", "value")

    def __init__(self) -> None:
        self.value: float | None = None
        self.measured_at = 0.0

    def add(self, units: int, seconds: float, now: float) -> None:
        if units <= 0 or seconds <= 0:
            return
        rate = seconds / units
        self.value = rate if self.value is None else self.value + _WEIGHT * (rate - self.value)
        self.measured_at = now


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
        """A tier delivered ``num_bytes`` of payload, ``seconds`` after they were asked for."""
        self._read.setdefault(tier, Rate()).add(num_bytes, seconds, now)

    def worth_loading(self, namespace: bytes, tier: str, num_tokens: int, num_bytes: int, now: float) -> bool:
        """Whether reading ``num_bytes`` from ``tier`` is expected to beat computing ``num_tokens``."""
        prefill, read = self._prefill.get(namespace), self._read.get(tier)
        if not self.enabled or prefill is None or read is None or prefill.value is None or read.value is None:
            return True
        if read.value * num_bytes < prefill.value * num_tokens:
            return True
        if now - read.measured_at > RETRY_SECONDS:
            read.value = None
            return True
        return False

    def estimates(self) -> dict[str, float]:
        """Measured rates, for the statistics: bytes/s of each tier, prefill tokens/s."""
        rates = {f"{tier}_bytes_per_second": 1 / r.value for tier, r in self._read.items() if r.value}
        prefill = [r.value for r in self._prefill.values() if r.value]
        if prefill:
            rates["prefill_tokens_per_second"] = 1 / min(prefill)
        return rates
