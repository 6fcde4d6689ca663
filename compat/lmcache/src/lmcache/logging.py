"""Loggers by LMCache's function."""

from __future__ import annotations

from logging import Logger, getLogger

from kvstrata_lmcache.missing import missing_names

__all__ = ["init_logger"]
__getattr__ = missing_names(__name__)


def init_logger(name: str) -> Logger:
    """The logger of that name, as it is."""
    return getLogger(name)
