"""From a tier's configuration to the tier."""

from __future__ import annotations

import msgspec

from kvstrata import plugins
from kvstrata.config import TierConfig, mask
from kvstrata.errors import ConfigError
from kvstrata.tiers.base import Tier


def open_tier(config: TierConfig) -> Tier:
    """Make the tier that ``config`` describes; it may read its directory, it need not connect yet.

    Raises:
        ConfigError: an option is wrong.
        PluginError: there is no such tier, or it cannot be loaded.
    """
    tier_class: type[Tier] = plugins.load("tiers", config.kind)
    try:
        options = msgspec.convert(config.options, tier_class.Options)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of tier {config.name!r}: {error}, in {mask(config.options)!r}") from None
    # Every tier is made from its own options, which the contract of the class cannot express.
    make: type = tier_class
    tier = make(options)
    if not isinstance(tier, Tier):
        raise ConfigError(f"plug-in {config.kind!r} is not a tier")
    return tier
