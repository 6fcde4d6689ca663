"""The configuration: one tree of settings, its sources, and what it says about tiers.

resolved = load_settings()
for notice in resolved.notices: log it once
tiers = tier_configs(resolved.settings)
"""

from __future__ import annotations

from kvstrata.config.codecs import chain_fault, parse_codec
from kvstrata.config.load import DEFAULT, Resolved, load_settings
from kvstrata.config.quotas import DEFAULT_QUOTA, QUOTA_NAME, QuotaConfig, quota_configs, quota_fault
from kvstrata.config.secrets import mask, mask_url
from kvstrata.config.settings import ALIASES, GIB, SETTINGS, Setting, Settings
from kvstrata.config.tiers import TierConfig, WritePolicy, tier_configs, tier_from_url, unbounded
from kvstrata.config.values import DIRECTORY_SCHEMES

__all__ = [
    "ALIASES",
    "DEFAULT",
    "DEFAULT_QUOTA",
    "DIRECTORY_SCHEMES",
    "GIB",
    "QUOTA_NAME",
    "SETTINGS",
    "QuotaConfig",
    "Resolved",
    "Setting",
    "Settings",
    "TierConfig",
    "WritePolicy",
    "chain_fault",
    "load_settings",
    "mask",
    "mask_url",
    "parse_codec",
    "quota_configs",
    "quota_fault",
    "tier_configs",
    "tier_from_url",
    "unbounded",
]
