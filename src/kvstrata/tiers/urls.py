"""What the URLs of tiers have in common: parameters, and the messages for wrong ones."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from kvstrata.errors import ConfigError


def wrong(tier: str, what: str) -> ConfigError:
    """The error for a URL of the tier of that kind."""
    return ConfigError(f"url of the {tier} tier: {what}")


def unknown_parameter(tier: str, name: str, known: Collection[str], *, otherwise: str = "") -> ConfigError:
    """The error for a parameter that there is not: the nearest known one, else ``otherwise``."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else otherwise
    return wrong(tier, f"unknown parameter {name!r}{hint}")


def flag(tier: str, query: Mapping[str, str], name: str, values: Mapping[str, Any]) -> Any:
    """The value that a parameter stands for; the first of ``values`` when it is not given.

    Raises:
        ConfigError: it is none of them.
    """
    text = query.get(name, next(iter(values))).lower()
    if text not in values:
        raise wrong(tier, f"{name}={text!r}; allowed are {', '.join(values)}")
    return values[text]
