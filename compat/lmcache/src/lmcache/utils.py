"""What vLLM's own module of ``LMCacheMPConnector`` imports from here."""

from __future__ import annotations

from kvstrata_lmcache.missing import missing_names
from lmcache.logging import init_logger

__all__ = ["init_logger"]
__getattr__ = missing_names(__name__)
