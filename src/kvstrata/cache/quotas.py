"""The quotas of a core: which salt may hold how much of which tier, and how much each holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import msgspec

from kvstrata.cache import l1 as l1_module
from kvstrata.cache.io import TierIO
from kvstrata.config import DEFAULT_QUOTA, QuotaConfig, quota_fault
from kvstrata.errors import ConflictError, NotFoundError, OperationError, TierError
from kvstrata.hashing import salt_id
from kvstrata.metrics import L1
from kvstrata.quotas import Quota, Usage
from kvstrata.tiers.base import QuotaTier
from kvstrata.turns import take_turns


class SaltQuota(msgspec.Struct, frozen=True):
    """One salt in one tier."""

    name: str
    tier: str
    reserved_bytes: int
    limit_bytes: int | None
    num_entries: int
    used_bytes: int
    num_evicted: int
    num_refused: int


class SaltQuotas:
    """All quotas. Thread-safe; changes may take as long as evicting what they do not allow."""

    def __init__(self, l1: l1_module.L1, tiers: Sequence[TierIO]) -> None:
        self._l1 = l1
        self._tiers = {tier.name: tier.tier for tier in tiers if isinstance(tier.tier, QuotaTier)}
        self._names = [L1, *(tier.name for tier in tiers)]
        self._lock = threading.Lock()
        """Around changes; taken before the core's."""
        self._configs: dict[str, QuotaConfig] = {}

    def configs(self) -> list[QuotaConfig]:
        """What is in force, in the order in which it was set."""
        return list(self._configs.values())

    def put(self, *configs: QuotaConfig) -> None:
        """Have these quotas besides those that there are, in place of any of the same name. All or nothing.

        Raises:
            OperationError: one is wrong, or for a tier that keeps no quotas.
            ConflictError: two are for the same salt, or more is reserved than there is.
            TierUnavailable: a tier could not delete what they do not allow; the old ones stay in force.
        """
        with self._lock:
            changed = dict(self._configs)
            for config in configs:
                changed.pop(config.name, None)
                self._check(config, list(changed.values()))
                changed[config.name] = config
            for tier in (L1, *self._tiers):
                self._check_reserved(tier, changed)
            self._apply(changed)

    def remove(self, name: str) -> None:
        """End a quota. What its salt holds stays, and competes with all others.

        Raises:
            NotFoundError: there is none of that name.
        """
        with self._lock:
            if name not in self._configs:
                raise NotFoundError(f"there is no quota {name!r}")
            self._apply({other: config for other, config in self._configs.items() if other != name})

    def _check(self, config: QuotaConfig, others: list[QuotaConfig]) -> None:
        fault = quota_fault(config, others, self._names)
        if fault:
            raise OperationError(f"quota {config.name!r} is not allowed: {fault}")
        for tier in config.tiers:
            if tier != L1 and tier not in self._tiers:
                raise OperationError(
                    f"quota {config.name!r} is not allowed: tier {tier} keeps no quotas; l1 and disk tiers do"
                )

    def _check_reserved(self, tier: str, configs: dict[str, QuotaConfig]) -> None:
        reserved = sum(
            config.tiers[tier].reserved_bytes for config in configs.values() if tier in config.tiers
        )
        if tier == L1:
            budget: int | None = self._l1.index.allocator.budget_bytes
        else:
            budget = self._tiers[tier].stats().budget_bytes
        if reserved and budget is not None and reserved > budget:
            raise ConflictError(f"{reserved:,} bytes would be reserved of {tier}, which has {budget:,}")

    def _apply(self, configs: dict[str, QuotaConfig]) -> None:
        """Have these: in the tiers, which can fail, and then in L1, which cannot.

        Raises:
            TierUnavailable: a tier could not delete what they do not allow. All have the quotas from before again.
        """
        changed = []
        try:
            for name, tier in self._tiers.items():
                changed.append(name)
                tier.set_quotas(*_amounts(configs, name))
        except TierError:
            for name in changed:
                with contextlib.suppress(TierError):  # its quotas are the old ones, whatever it cannot delete
                    self._tiers[name].set_quotas(*_amounts(self._configs, name))
            raise
        take_turns(self._l1.lock, self._l1.index.change_quotas(*_amounts(configs, L1)))
        self._configs = configs

    def report(self) -> list[SaltQuota]:
        """Every quota with what is held."""
        found = []
        for config in self.configs():
            for tier, quota in config.tiers.items():
                usage = msgspec.structs.astuple(self._usage(tier, config))
                found.append(SaltQuota(config.name, tier, quota.reserved_bytes, quota.limit_bytes, *usage))
        return found

    def _usage(self, tier: str, config: QuotaConfig) -> Usage:
        whose = None if config.name == DEFAULT_QUOTA else salt_id(config.cache_salt)
        if tier != L1:
            return self._tiers[tier].usage(whose)
        with self._l1.lock:
            return self._l1.index.accounts.usage(whose)


def _amounts(configs: dict[str, QuotaConfig], tier: str) -> tuple[dict[bytes, Quota], Quota | None]:
    """The quotas of a tier by the ids of their salts, and what each other salt may hold."""
    quotas = {
        salt_id(config.cache_salt): config.tiers[tier]
        for config in configs.values()
        if tier in config.tiers and config.name != DEFAULT_QUOTA
    }
    default = configs[DEFAULT_QUOTA].tiers.get(tier) if DEFAULT_QUOTA in configs else None
    return quotas, default
