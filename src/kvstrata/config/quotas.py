"""From settings to the quotas of salts."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated

import msgspec

from kvstrata.config.secrets import MASK
from kvstrata.config.settings import Settings
from kvstrata.config.tiers import tier_configs
from kvstrata.errors import ConfigError
from kvstrata.quotas import Quota

DEFAULT_QUOTA = "default"
"""The name of the quota of every salt that has none of its own."""
MAX_QUOTAS = 1000
QUOTA_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


class QuotaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one ``cache_salt`` may hold of each tier."""

    name: Annotated[str, msgspec.Meta(pattern=QUOTA_NAME)]
    """How the API, metrics and logs call it."""
    salt: str | None = None
    """The salt itself, which is shown nowhere; None: its name is the salt. Empty: requests without a salt."""
    tiers: dict[str, Quota]
    """By tier: ``l1``, or one that keeps quotas."""

    @property
    def cache_salt(self) -> str:
        """The salt that it is for; not for the default quota."""
        return self.name if self.salt is None else self.salt

    def __repr__(self) -> str:
        salt = None if self.salt is None else MASK
        return f"QuotaConfig(name={self.name!r}, salt={salt!r}, tiers={self.tiers!r})"


def quota_configs(settings: Settings) -> list[QuotaConfig]:
    """The quotas that ``settings`` ask for.

    Raises:
        ConfigError: one of them is wrong, or two contradict each other. What tiers have room for is not known here.
    """
    quotas: list[QuotaConfig] = []
    tiers = ["l1", *(tier.name for tier in tier_configs(settings))] if settings.quotas else []
    for index, item in enumerate(settings.quotas):
        try:
            quota = msgspec.convert(item, QuotaConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"quotas[{index}] is not allowed: {error}") from None
        fault = quota_fault(quota, quotas, tiers)
        if fault:
            raise ConfigError(f"quotas[{index}] is not allowed: {fault}")
        quotas.append(quota)
    return quotas


def quota_fault(quota: QuotaConfig, others: list[QuotaConfig], tiers: Container[str]) -> str:
    """What is wrong with ``quota`` beside ``others``; empty for nothing."""
    unknown = [tier for tier in quota.tiers if tier not in tiers]
    if unknown:
        return f"there is no tier {unknown[0]!r}"
    for tier, amounts in quota.tiers.items():
        if amounts.limit_bytes is not None and amounts.limit_bytes < amounts.reserved_bytes:
            return f"of {tier} more is reserved than the limit allows"
        if quota.name == DEFAULT_QUOTA and amounts.reserved_bytes:
            return "nothing can be reserved for salts that are not named: their number has no bound"
    if quota.name == DEFAULT_QUOTA and quota.salt is not None:
        return f"{DEFAULT_QUOTA!r} is for all salts without a quota, and has none itself"
    if len(others) >= MAX_QUOTAS:
        return f"there are {MAX_QUOTAS} already"
    if any(other.name == quota.name for other in others):
        return f"there are two named {quota.name!r}"
    if quota.name == DEFAULT_QUOTA:
        return ""
    same = [o.name for o in others if o.name != DEFAULT_QUOTA and o.cache_salt == quota.cache_salt]
    return f"{same[0]!r} is for the same salt" if same else ""
