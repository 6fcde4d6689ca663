"""What may be changed while the server runs. A restart brings the configured values back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from kvstrata.cache.cache import Cache
from kvstrata.cache.gate import MODES
from kvstrata.errors import ConflictError, OperationError
from kvstrata.logs import LOGGER_NAME
from kvstrata.metrics import L1
from kvstrata.operations.entries import Entries
from kvstrata.operations.report import Report
from kvstrata.tiers.base import ExpiringTier

logger = logging.getLogger(__name__)

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_EVICTIONS_AT_ONCE = 256
"""Entries evicted under one hold of the core's lock when L1 shrinks: a few ms."""


@dataclass(frozen=True)
class RuntimeReport(Report):
    """What is in force now."""

    l1_budget_bytes: int
    l1_capacity_bytes: int
    """The size of the pool that was made at start; the budget cannot exceed it."""
    l1_used_bytes: int
    """More than the budget while entries in use keep it from shrinking."""
    log_level: str
    gate: str
    """``auto``, ``always`` or ``never``, as the setting of that name."""
    stores_frozen: bool
    """True: nothing new is stored, in no tier; what is held is served on."""
    bypassed_tiers: list[str]
    """Tiers that are neither read nor written. Misses that this causes have the reason ``tier_down``."""
    ttl_seconds: dict[str, int | None]
    """Tier -> how long entries that are written now live; null is for ever. Only tiers where it can be changed."""


class Runtime:
    """Changes take effect at once, and are logged."""

    def __init__(self, cache: Cache, entries: Entries) -> None:
        self._cache = cache
        self._entries = entries
        self._lock = threading.Lock()

    def report(self) -> RuntimeReport:
        """As of now."""
        with self._cache.guarded() as index:
            allocator = index.allocator
            budget, capacity, used = allocator.budget_bytes, allocator.capacity_bytes, allocator.used_bytes
        return RuntimeReport(
            l1_budget_bytes=budget,
            l1_capacity_bytes=capacity,
            l1_used_bytes=used,
            log_level=logging.getLevelName(logging.getLogger(LOGGER_NAME).getEffectiveLevel()),
            gate=self._cache.gate.mode,
            stores_frozen=self._cache.stores_frozen,
            bypassed_tiers=[tier.name for tier in self._cache.tiers if tier.breaker.bypassed],
            ttl_seconds={
                tier.name: tier.tier.ttl_seconds
                for tier in self._cache.tiers
                if isinstance(tier.tier, ExpiringTier)
            },
        )

    def change(
        self,
        *,
        l1_budget_bytes: int | None = None,
        log_level: str | None = None,
        gate: str | None = None,
        stores_frozen: bool | None = None,
        bypass: Mapping[str, bool] | None = None,
        ttl_seconds: Mapping[str, int | None] | None = None,
    ) -> RuntimeReport:
        """Change what is not None, all or nothing.

        Raises:
            NotFoundError: a tier in ``bypass`` does not exist.
            ConflictError: the budget exceeds the pool, or is less than quotas reserve.
            OperationError: a value is not allowed.
        """
        with self._lock:
            self._check(l1_budget_bytes, log_level, gate, bypass or {})
            expiring = {self._expiring(name): seconds for name, seconds in (ttl_seconds or {}).items()}
            for tier, seconds in expiring.items():
                tier.set_ttl(seconds)
            if log_level is not None:
                logging.getLogger(LOGGER_NAME).setLevel(log_level)
            if gate is not None:
                self._cache.gate.mode = gate
            if stores_frozen is not None:
                self._cache.stores_frozen = stores_frozen
            for name, wanted in (bypass or {}).items():
                self._entries.tier(name).breaker.bypassed = wanted
            if l1_budget_bytes is not None:
                self._resize(l1_budget_bytes)
        asked = {
            "l1_budget_bytes": l1_budget_bytes,
            "log_level": log_level,
            "gate": gate,
            "stores_frozen": stores_frozen,
            "bypass": bypass or None,
            "ttl_seconds": ttl_seconds or None,
        }
        changes = ", ".join(f"{name}={value}" for name, value in asked.items() if value is not None)
        if changes:
            logger.info("changed by an operator: %s", changes)
        return self.report()

    def _check(
        self, l1_budget_bytes: int | None, log_level: str | None, gate: str | None, bypass: Mapping[str, bool]
    ) -> None:
        for name in bypass:
            if name == L1:
                raise OperationError("l1 cannot be bypassed: everything passes through it")
            self._entries.tier(name)
        if log_level is not None and log_level not in LOG_LEVELS:
            raise OperationError(f"log_level is {log_level!r}; allowed are {', '.join(LOG_LEVELS)}")
        if gate is not None and gate not in MODES:
            raise OperationError(f"gate is {gate!r}; allowed are {', '.join(MODES)}")
        capacity = self._cache.index.allocator.capacity_bytes
        if l1_budget_bytes is not None and l1_budget_bytes < 0:
            raise OperationError("l1_budget_bytes is negative")
        with self._cache.guarded() as index:
            reserved = index.accounts.reserved_bytes
        if l1_budget_bytes is not None and l1_budget_bytes < reserved:
            raise ConflictError(
                f"l1_budget_bytes is {l1_budget_bytes:,}; quotas reserve {reserved:,} bytes of l1: lower them first"
            )
        if l1_budget_bytes is not None and l1_budget_bytes > capacity:
            raise ConflictError(
                f"l1_budget_bytes is {l1_budget_bytes:,}; the pool has {capacity:,}, and to make it larger takes "
                "a restart with another max_local_cpu_size"
            )

    def _expiring(self, name: str) -> ExpiringTier:
        tier = None if name == L1 else self._entries.tier(name).tier
        if isinstance(tier, ExpiringTier):
            return tier
        raise OperationError(f"tier {name}: how long its entries live cannot be changed while it runs")

    def _resize(self, budget_bytes: int) -> None:
        with self._cache.guarded() as index:
            index.allocator.budget_bytes = budget_bytes
        there_is_more = True
        while there_is_more:
            with self._cache.guarded() as index:
                there_is_more = index.shrink(_EVICTIONS_AT_ONCE)
