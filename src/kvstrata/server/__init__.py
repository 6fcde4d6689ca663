"""The cache server."""

from __future__ import annotations

from kvstrata.server.lifecycle import run

__all__ = ["run"]
