"""The shared-directory tier."""

from kvstrata.tiers.file.tier import FileOptions, FileTier

__all__ = ["FileOptions", "FileTier"]
