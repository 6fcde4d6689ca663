"""The tiers as an operator sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstrata.cache.cache import Cache
from kvstrata.metrics import L1, OPERATIONS, Metrics
from kvstrata.operations.report import Report


@dataclass(frozen=True)
class OperationFigures(Report):
    """Operations of one kind on one tier that succeeded, since the start."""

    operation: str
    count: int
    bytes: int
    seconds: float
    """Of all of them together."""
    p50_seconds: float | None
    """Quantiles are interpolated in the buckets of the histogram; null without an operation, or beyond 10 s."""
    p90_seconds: float | None
    p99_seconds: float | None


@dataclass(frozen=True)
class TierReport(Report):
    """One tier."""

    name: str
    kind: str
    where: str
    """Where the data is; without secrets."""
    codec: str | None
    state: str
    """"up", "down" (its circuit breaker is open) or "bypassed"."""
    entries: int | None
    """Null where the backend cannot tell."""
    used_bytes: int | None
    budget_bytes: int | None
    hit_tokens: int
    """Prompt tokens that were found here."""
    errors: int
    """Operations that failed."""
    queued_bytes: int
    """Bytes that wait to be written."""
    dropped_writes: int
    evictions: int | None
    """Entries that were evicted; null for tiers that do not say."""
    operations: list[OperationFigures]


def report_tiers(cache: Cache) -> list[TierReport]:
    """L1, then the others in their order. Waits for each backend for a moment only."""
    totals = cache.metrics.totals()
    return [_l1(cache, totals), *(_lower(tier.stats(), totals, cache.metrics) for tier in cache.tiers)]


def _l1(cache: Cache, totals: Mapping[str, Any]) -> TierReport:
    stats = cache.l1_stats()
    return TierReport(
        name=L1,
        kind="memory",
        where="host memory",
        codec=None,
        state="up",
        entries=stats["entries"],
        used_bytes=stats["used_bytes"],
        budget_bytes=stats["budget_bytes"],
        hit_tokens=int(totals["hit_tokens"].get(L1, 0)),
        errors=0,
        queued_bytes=0,
        dropped_writes=int(totals["stores_dropped"]),
        evictions=stats["evictions"],
        operations=[],
    )


def _lower(stats: Mapping[str, Any], totals: Mapping[str, Any], metrics: Metrics) -> TierReport:
    name = stats["name"]
    return TierReport(
        name=name,
        kind=stats["kind"],
        where=stats["where"],
        codec=stats["codec"],
        state=stats["state"],
        entries=stats["entries"],
        used_bytes=stats["used_bytes"],
        budget_bytes=stats["budget_bytes"],
        hit_tokens=int(totals["hit_tokens"].get(name, 0)),
        errors=int(totals["tier_errors"].get(name, 0)),
        queued_bytes=stats["queued_bytes"],
        dropped_writes=stats["dropped_writes"],
        evictions=None,
        operations=[_figures(metrics, name, operation) for operation in OPERATIONS],
    )


def _figures(metrics: Metrics, tier: str, operation: str) -> OperationFigures:
    buckets, seconds = metrics.operation_buckets(tier, operation)
    p50, p90, p99 = (quantile(buckets, share) for share in (0.5, 0.9, 0.99))
    return OperationFigures(
        operation=operation,
        count=int(buckets[-1][1]),
        bytes=metrics.operation_bytes(tier, operation),
        seconds=seconds,
        p50_seconds=p50,
        p90_seconds=p90,
        p99_seconds=p99,
    )


def quantile(buckets: Sequence[tuple[float, float]], share: float) -> float | None:
    """The value below which ``share`` of the observations lie, as Prometheus' histogram_quantile estimates it.

    ``buckets`` are (upper bound, number of observations up to it), the last bound infinite. None without
    observations, and where it lies above the last finite bound.
    """
    wanted = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for high, up_to in buckets:
        if up_to and up_to >= wanted:
            if math.isinf(high):
                return None
            return low + (high - low) * (wanted - below) / (up_to - below)
        low, below = high, up_to
    return None
