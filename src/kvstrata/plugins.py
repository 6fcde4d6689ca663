"""Tiers, codecs and policies, found by name through entry points.

A plug-in is one entry point in the group ``kvstrata.tiers``, ``kvstrata.codecs`` or ``kvstrata.policies``.
Nothing is imported before it is asked for by name. An entry point may name the extra that it needs
(``s3 = "kvstrata.tiers.s3:S3Tier [s3]"``); messages then say what to install.
"""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Literal

from kvstrata.errors import PluginError

Group = Literal["tiers", "codecs", "policies"]

_SINGULAR: dict[Group, str] = {"tiers": "tier", "codecs": "codec", "policies": "policy"}


@functools.cache
def _found(group: Group) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"kvstrata.{group}")}


def names(group: Group) -> list[str]:
    """The names of all plug-ins of ``group``, sorted. Imports none of them."""
    return sorted(_found(group))


@functools.cache
def load(group: Group, name: str) -> Any:
    """The class that the plug-in ``name`` of ``group`` stands for. Thread-safe.

    Raises:
        PluginError: there is none of that name, or it cannot be imported.
    """
    point = _found(group).get(name)
    if point is None:
        listed = ", ".join(names(group)) or "none: is kvstrata installed (pip install)?"
        raise PluginError(f"no {_SINGULAR[group]} {name!r} in this installation; there is: {listed}")
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise PluginError(f"{_SINGULAR[group]} {name!r} cannot be loaded: {error}{_advice(point)}") from error


def _advice(point: EntryPoint) -> str:
    if not point.extras or point.dist is None:
        return ""
    return f"; install it with: pip install '{point.dist.name}[{','.join(point.extras)}]'"


def library(name: str, extra: str, system_package: str = "") -> ModuleType:
    """Import the module ``name`` of a client library that only one plug-in needs; its settings can be read without.

    Raises:
        PluginError: it is not installed, or cannot be loaded; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise PluginError(f"{error}; install it with: pip install 'kvstrata[{extra}]'") from error
    except (ImportError, OSError) as error:
        wants = f"; it wants a package of the system (Debian: {system_package})" if system_package else ""
        raise PluginError(f"the library {name!r} cannot be loaded: {error}{wants}") from error
