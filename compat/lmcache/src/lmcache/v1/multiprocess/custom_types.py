"""What vLLM's own module of ``LMCacheMPConnector`` imports from here."""

from __future__ import annotations

from kvstrata_lmcache.missing import Unused, missing_names

__all__ = ["BlockAllocationRecord", "RequestAllocationRecord"]
__getattr__ = missing_names(__name__)

BlockAllocationRecord = RequestAllocationRecord = Unused
