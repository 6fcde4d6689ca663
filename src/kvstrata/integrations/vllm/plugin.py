"""vLLM's plug-in entry point: makes the connectors known by name in every process of vLLM.

Where LMCache is not installed, its connectors' names lead to ours. So do the modules that its users name in
``kv_connector_module_path``: they are those of the drop-in (compat/lmcache), or else made here.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from kvstrata.distributions import DROP_IN, installed_version, lmcache_conflict

_PACKAGE = "kvstrata.integrations.vllm"
_ORIGIN = "kvstrata"
_LMCACHE_NAMES = ("LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheMPConnector")
_LMCACHE_MODULES = (
    "lmcache",
    "lmcache.integration",
    "lmcache.integration.vllm",
    "lmcache.integration.vllm.lmcache_connector_v1",
    "lmcache.integration.vllm.lmcache_mp_connector",
)

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the connectors. Cheap and idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import (  # noqa: PLC0415 (only inside vLLM)
        KVConnectorFactory,
    )

    names = ["KVStrataConnector"]
    conflict = lmcache_conflict()
    if conflict is not None:
        logger.warning("%s", conflict)
    elif installed_version(DROP_IN) is not None:
        names += _LMCACHE_NAMES
    elif not _has_lmcache():
        names += _LMCACHE_NAMES
        _stand_in_for_lmcache()
    for name in names:
        # vLLM refuses a second registration of a name; its own entries only lead to the missing package.
        KVConnectorFactory._registry.pop(name, None)  # noqa: SLF001
        KVConnectorFactory.register_connector(name, _PACKAGE, name)


def _has_lmcache() -> bool:
    spec = importlib.util.find_spec("lmcache")
    return spec is not None and spec.origin != _ORIGIN


def _stand_in_for_lmcache() -> None:
    for name in _LMCACHE_MODULES:
        if name in sys.modules:
            continue
        module = _StandIn(name)
        module.__spec__ = ModuleSpec(name, None, origin=_ORIGIN, is_package=True)
        module.__path__ = []
        sys.modules[name] = module


class _StandIn(ModuleType):
    """A module that has the connectors, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        if name in _LMCACHE_NAMES:
            return getattr(importlib.import_module(_PACKAGE), name)
        raise AttributeError(f"module {self.__name__!r} (provided by kvstrata) has no attribute {name!r}")
