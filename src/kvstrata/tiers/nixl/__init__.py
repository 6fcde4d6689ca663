"""The NIXL tier."""

from kvstrata.tiers.nixl.tier import NixlOptions, NixlTier

__all__ = ["NixlOptions", "NixlTier"]
