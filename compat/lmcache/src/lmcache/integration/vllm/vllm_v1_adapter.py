"""What vLLM's own ``LMCacheConnectorV1`` imports where kvstrata's plug-in of vLLM is switched off.

With the plug-in (``VLLM_PLUGINS`` does not leave it out) vLLM loads kvstrata's connector at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstrata.integrations.vllm.connector import LMCacheConnectorV1
from kvstrata_lmcache.missing import missing_names

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

__all__ = ["LMCacheConnectorV1Impl"]
__getattr__ = missing_names(__name__)


class LMCacheConnectorV1Impl:
    """Turns the connector that makes it into ours.

    vLLM's connector hands only a part of its calls on: neither those by which the halves of a connector learn of
    each other, nor the reports of workers. So it is not enough to answer the calls; its class is exchanged.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, parent: Any) -> None:
        parent.__class__ = LMCacheConnectorV1
        LMCacheConnectorV1.__init__(parent, vllm_config, role, parent._kv_cache_config)  # noqa: SLF001
