"""The Mooncake tier."""

from kvstrata.tiers.mooncake.options import MooncakeOptions
from kvstrata.tiers.mooncake.tier import MooncakeTier

__all__ = ["MooncakeOptions", "MooncakeTier"]
