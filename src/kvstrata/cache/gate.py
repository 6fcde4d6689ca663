"""The gate: load or recompute. Nothing is loaded that is not measured to load clearly faster than it is recomputed.

Estimates come from what was seen. Of a tier: the latency of its look-ups, and seconds per byte of its reads
(decoding included, and queueing for as long as others are under way), or of its writes until it was read from. Of
an engine: seconds per token of its prefill; without it everything is loaded. Where nothing is known of the tier, or
what is known says "recompute" and is old, one load at a time is **tried**: its request waits for it no longer than
:data:`TRIAL_SHARE` of the time that computing takes, and the load goes on to be measured.

A load that takes much longer than estimated is **given up**: no request waits for it any more, and it goes on to be
measured. None waits for a load longer than computing takes (docs/adr/0017).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from kvstrata.cache.rates import Rate, TierRates

MODES = ("auto", "always", "never")
"""Load what is measured to be faster than computing; load all that tiers hold; load nothing from them."""
RETRY_SECONDS = 60.0
"""An estimate that says "recompute" is tried again after so long: a tier may have become fast."""
TRIAL_SHARE = 0.05
WORTHWHILE_SHARE = 0.8
"""Of the time that computing takes: what is estimated to load in less is loaded. A load that is hardly faster gains
little, and one that turns out slower costs its request up to twice the time."""
LATE = 2.0
"""A load that took so many times its estimate is given up. One that shares its link with another one is not."""
HICCUP_SHARE = 0.25
"""Of the time that computing takes: a load that takes less is never given up, however small its estimate. A pause
of the backend or a lost packet costs less than computing; a link that has become slow costs one request no more."""
_SLOWER = 1.1
"""A read that took so many times its estimate is what the tier is like now."""


class Verdict(enum.StrEnum):
    """What the gate says to a load. The values are metric labels."""

    LOAD = "load"
    TRIAL = "trial"
    RECOMPUTE = "recompute"


class Decision(msgspec.Struct, frozen=True):
    """What was decided about loading from one tier, and on which grounds."""

    tier: str
    verdict: Verdict
    num_tokens: int
    num_bytes: int
    load_seconds: float | None
    """Estimate; None: the tier was not measured."""
    prefill_seconds: float | None
    """Estimate of computing the same tokens; None: the engine was not measured."""
    patience_seconds: float | None = None
    """How long a request may wait for this load; None: as long as for anything."""


class Gate:
    """Decides per tier how much of a found prefix is worth loading. Guarded by the core's lock."""

    def __init__(self, mode: str | bool = "auto") -> None:
        """``mode`` is one of :data:`MODES`, or as it was once written: true is ``auto``, false ``always``."""
        self.mode = mode if isinstance(mode, str) else ("auto" if mode else "always")
        if self.mode not in MODES:
            raise ValueError(f"gate {mode!r}; allowed are {', '.join(MODES)}")
        self._prefill: dict[bytes, Rate] = {}
        self._tiers: dict[str, TierRates] = {}

    def _rates(self, tier: str) -> TierRates:
        return self._tiers.setdefault(tier, TierRates())

    # What is measured

    def prefilled(self, namespace: bytes, num_tokens: int, seconds: float) -> None:
        """The engine of ``namespace`` (its fingerprint) computed ``num_tokens`` prompt tokens."""
        self._prefill.setdefault(namespace, Rate()).add(num_tokens, seconds)

    def answered(self, tier: str, seconds: float) -> None:
        """A tier said which keys it holds."""
        self._rates(tier).latency.add(1, seconds)

    def read(self, tier: str, num_bytes: int, seconds: float, now: float) -> None:
        """A tier delivered ``num_bytes`` of payloads, the last of them ``seconds`` after they were asked for."""
        rates = self._rates(tier)
        estimate = rates.load_seconds(rates.reads.value, num_bytes)
        is_slower = estimate is not None and seconds > _SLOWER * estimate
        if num_bytes > 0 and (rates.tried_at is not None or is_slower) and rates.reads.is_typical(num_bytes):
            # An average would follow a change of speed over several requests, each of which pays for it.
            rates.reads.restart()
        rates.tried_at = None
        rates.add(rates.reads, num_bytes, seconds, now)
        rates.end(num_bytes, now)

    def wrote(self, tier: str, num_bytes: int, seconds: float, now: float) -> None:
        """A tier took ``num_bytes`` of a payload. That counts until it was read from."""
        rates = self._rates(tier)
        if rates.reads.value is None:
            rates.add(rates.writes, num_bytes, seconds, now)

    def begun(self, decision: Decision, now: float) -> None:
        """A load begins that was let through. Once it has ended, ``read`` is called."""
        rates = self._rates(decision.tier)
        rates.begin(now)
        if decision.verdict is Verdict.TRIAL:
            rates.tried_at = now
        elif decision.load_seconds is not None:
            rates.free_at = max(rates.free_at, now) + decision.load_seconds

    # What follows

    def prefill_seconds(self, namespace: bytes, num_tokens: int) -> float | None:
        """Estimate of computing so many tokens."""
        rate = self._prefill.get(namespace)
        return None if rate is None or rate.value is None else rate.value * num_tokens

    def decide(self, namespace: bytes, tier: str, num_tokens: int, num_bytes: int, now: float) -> Decision:
        """Whether to read ``num_bytes`` from ``tier`` rather than compute ``num_tokens``."""
        rates = self._rates(tier)
        per_byte = rates.writes.value if rates.reads.value is None else rates.reads.value
        load, prefill = rates.load_seconds(per_byte, num_bytes), self.prefill_seconds(namespace, num_tokens)
        verdict = Verdict.LOAD
        if self.mode == "never":
            verdict = Verdict.RECOMPUTE
        elif (
            self.mode == "auto"
            and prefill is not None
            and (load is None or load >= WORTHWHILE_SHARE * prefill)
        ):
            is_open = load is None or now - rates.measured_at > RETRY_SECONDS
            is_tried = rates.tried_at is not None and now - rates.tried_at <= RETRY_SECONDS
            verdict = Verdict.TRIAL if is_open and not is_tried else Verdict.RECOMPUTE
        patience = None
        if self.mode == "auto" and prefill is not None:
            behind = max(0.0, rates.free_at - now)
            patience = _patience_seconds(verdict, None if load is None else behind + load, prefill)
        return Decision(tier, verdict, num_tokens, num_bytes, load, prefill, patience)

    def patience_seconds(self, namespace: bytes, num_tokens: int) -> float | None:
        """How long a request of so many tokens may wait for loads, whoever began them; None: no bound."""
        return self.prefill_seconds(namespace, num_tokens) if self.mode == "auto" else None

    def order(self, tiers: Sequence[str], num_bytes: int) -> list[int]:
        """The tiers by how fast each would deliver ``num_bytes``.

        One that was not read from yet keeps its place: it is measured when it is used, never used only for that.
        """
        order: list[tuple[int, float | None]] = []
        for i, tier in enumerate(tiers):
            rates = self._rates(tier)
            seconds = rates.load_seconds(rates.reads.value, num_bytes)
            place = len(order)
            while (
                seconds is not None
                and place
                and (before := order[place - 1][1]) is not None
                and seconds < before
            ):
                place -= 1
            order.insert(place, (i, seconds))
        return [i for i, _ in order]

    def estimates(self) -> dict[str, float]:
        """Measured rates, for the statistics: bytes/s and latency of each tier, prefill tokens/s."""
        rates: dict[str, float] = {}
        for name, tier in self._tiers.items():
            if tier.reads.value:
                rates[f"{name}_bytes_per_second"] = 1 / tier.reads.value
            if tier.latency.value:
                rates[f"{name}_latency_seconds"] = tier.latency.value
        prefill = [r.value for r in self._prefill.values() if r.value]
        if prefill:
            rates["prefill_tokens_per_second"] = 1 / min(prefill)
        return rates


def _patience_seconds(verdict: Verdict, load_seconds: float | None, prefill_seconds: float) -> float:
    """When a load is given up that is estimated to take so long, those before it included."""
    if verdict is Verdict.TRIAL:
        return TRIAL_SHARE * prefill_seconds
    if load_seconds is None:
        return prefill_seconds
    return min(prefill_seconds, max(LATE * load_seconds, HICCUP_SHARE * prefill_seconds))
