"""From a tier's configuration to the tier."""

from __future__ import annotations

import msgspec

from kvstrata import plugins
from kvstrata.config import TierConfig, mask
from kvstrata.errors import ConfigError, TierError
from kvstrata.tiers.base import Tier


def open_tier(config: TierConfig) -> Tier:
    """Make the tier that ``config`` describes; it may read its directory, it need not connect yet.

    Raises:
        ConfigError: an option is wrong, or its place (a directory, say) cannot be used.
        PluginError: there is no such tier, or it cannot be loaded.
    """
    tier_class = plugins.load("tiers", config.kind)
    try:
        tier: Tier = tier_class(msgspec.convert(config.options, tier_class.Options))
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of tier {config.name!r}: {error}, in {mask(config.options)!r}") from None
    except (TierError, OSError) as error:
        raise ConfigError(f"tier {config.name!r} cannot be opened: {error}") from error
    return tier
