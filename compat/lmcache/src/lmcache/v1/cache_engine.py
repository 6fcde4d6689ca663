"""What programs that run vLLM as a library call when they end."""

from __future__ import annotations

from kvstrata_lmcache.missing import missing_names

__all__ = ["LMCacheEngineBuilder"]
__getattr__ = missing_names(__name__)


class LMCacheEngineBuilder:
    """There is no engine in the process to build."""

    @classmethod
    def destroy(cls, instance_id: str) -> None:
        """Nothing to do: the cache server ends with vLLM, after what is queued is written."""
