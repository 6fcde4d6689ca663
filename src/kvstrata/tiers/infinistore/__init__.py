"""The InfiniStore tier."""

from kvstrata.tiers.infinistore.tier import InfiniStoreOptions, InfiniStoreTier

__all__ = ["InfiniStoreOptions", "InfiniStoreTier"]
