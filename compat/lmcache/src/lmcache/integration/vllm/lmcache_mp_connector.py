"""The connector to a server, as ``kv_connector_module_path`` names it."""

from __future__ import annotations

from kvstrata.integrations.vllm.connector import LMCacheMPConnector

__all__ = ["LMCacheMPConnector"]
