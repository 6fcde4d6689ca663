"""Quotas as an operator sees and sets them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvstrata.cache.cache import Cache
from kvstrata.config import QUOTA_NAME, QuotaConfig
from kvstrata.errors import NotFoundError, OperationError
from kvstrata.operations.report import Report
from kvstrata.quotas import Quota

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TierQuota(Report):
    """What a salt may hold of one tier, and holds."""

    tier: str
    reserved_bytes: int
    """Loads of other salts never evict it below this."""
    limit_bytes: int | None
    """It never holds more; null: as much as there is."""
    used_bytes: int
    """More than the limit only while entries in use keep it from shrinking, after the limit was lowered."""
    entries: int
    evictions: int
    """Entries that went for its limit, since the quota was set."""
    refusals: int
    """Entries for which its limit, or what is reserved for others, left no room."""


@dataclass(frozen=True)
class QuotaReport(Report):
    """The quota of one salt. The salt itself is not told."""

    name: str
    """``default`` is for every salt that has no quota of its own; its figures are those of all of them together."""
    tiers: list[TierQuota]


class QuotaSettings:
    """Changes take effect at once, and are logged. A restart brings the configured quotas back."""

    def __init__(self, cache: Cache) -> None:
        self._quotas = cache.quotas

    def list(self) -> list[QuotaReport]:
        """All of them."""
        rows: dict[str, list[TierQuota]] = {config.name: [] for config in self._quotas.configs()}
        for held in self._quotas.report():
            row = TierQuota(
                tier=held.tier,
                reserved_bytes=held.reserved_bytes,
                limit_bytes=held.limit_bytes,
                used_bytes=held.used_bytes,
                entries=held.num_entries,
                evictions=held.num_evicted,
                refusals=held.num_refused,
            )
            rows.setdefault(held.name, []).append(row)
        return [QuotaReport(name, tiers) for name, tiers in rows.items()]

    def get(self, name: str) -> QuotaReport:
        """One of them.

        Raises:
            NotFoundError: there is none of that name.
        """
        for found in self.list():
            if found.name == name:
                return found
        raise NotFoundError(f"there is no quota {name!r}")

    def put(self, name: str, salt: str | None, tiers: Mapping[str, Quota]) -> QuotaReport:
        """Set a quota, a new one or in place of what it was. Without ``salt`` one that exists keeps its own.

        Raises:
            OperationError, ConflictError: it is not allowed, or contradicts others.
        """
        if not re.fullmatch(QUOTA_NAME, name):
            raise OperationError(
                "the name of a quota has letters, digits, dots, dashes and underscores only, at most 100; give "
                "salt beside it where that is another"
            )
        if not tiers:
            raise OperationError("give amounts for a tier at least")
        known = next((config for config in self._quotas.configs() if config.name == name), None)
        if salt is None and known is not None:
            salt = known.salt
        self._quotas.put(QuotaConfig(name=name, salt=salt, tiers=dict(tiers)))
        logger.info("quota %s set by an operator: %s", name, dict(tiers))
        return self.get(name)

    def remove(self, name: str) -> QuotaReport:
        """End a quota; what its salt holds stays, and competes with all others.

        Raises:
            NotFoundError: there is none of that name.
        """
        report = self.get(name)
        self._quotas.remove(name)
        logger.info("quota %s removed by an operator", name)
        return report
