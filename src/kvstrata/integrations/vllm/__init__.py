"""The connector for vLLM: ``"kv_connector_module_path": "kvstrata.integrations.vllm"``.

Nothing is imported before it is asked for: the plug-in of this package runs in every process of vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstrata.integrations.vllm.connector import (
        KVStrataConnector,
        LMCacheConnectorV1,
        LMCacheConnectorV1Dynamic,
        LMCacheMPConnector,
    )

__all__ = ["KVStrataConnector", "LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheMPConnector"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from kvstrata.integrations.vllm import connector  # noqa: PLC0415 (imports torch and vllm)

        return getattr(connector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
