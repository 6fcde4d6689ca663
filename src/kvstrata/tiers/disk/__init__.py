"""The disk tier."""

from kvstrata.tiers.disk.tier import DiskOptions, DiskTier

__all__ = ["DiskOptions", "DiskTier"]
