"""What programs and vLLM's own module of ``LMCacheMPConnector`` import from here."""

from __future__ import annotations

from kvstrata_lmcache.missing import Unused, missing_names

__all__ = ["ENGINE_NAME", "mla_enabled"]
__getattr__ = missing_names(__name__)

ENGINE_NAME = "vllm-instance"
"""What programs give to ``LMCacheEngineBuilder.destroy``."""

mla_enabled = Unused
