"""What a check found."""

from __future__ import annotations

import enum

import msgspec


class Level(enum.StrEnum):
    """How much it matters."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing."""
    WARNING = "warning"
    """It runs, but not well."""
    ERROR = "error"
    """It does not run, or would lose what it should keep."""


class Finding(msgspec.Struct, frozen=True):
    """One answer of one check."""

    check: str
    """What was looked at ("memory", "tier redis")."""
    level: Level
    found: str
    remedy: str = ""
    """What to do; empty when nothing is to be done."""
