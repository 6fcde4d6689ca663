"""The lm tier: a kvstrata remote server, or a server of LMCache."""

from kvstrata.tiers.lm.tier import LmOptions, LmTier

__all__ = ["LmOptions", "LmTier"]
