"""What vLLM's own module of ``LMCacheMPConnector`` imports before it takes the connector from ``lmcache``."""

from __future__ import annotations

from kvstrata_lmcache.missing import Unused, missing_names

__all__ = ["LMCacheMPSchedulerAdapter", "LMCacheMPWorkerAdapter", "LoadStoreOp", "ParallelStrategy"]
__getattr__ = missing_names(__name__)

LMCacheMPSchedulerAdapter = LMCacheMPWorkerAdapter = LoadStoreOp = ParallelStrategy = Unused
