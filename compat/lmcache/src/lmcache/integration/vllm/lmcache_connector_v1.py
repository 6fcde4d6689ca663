"""The connector of the in-process mode, as ``kv_connector_module_path`` names it."""

from __future__ import annotations

from kvstrata.integrations.vllm.connector import LMCacheConnectorV1, LMCacheConnectorV1Dynamic

__all__ = ["LMCacheConnectorV1", "LMCacheConnectorV1Dynamic"]
