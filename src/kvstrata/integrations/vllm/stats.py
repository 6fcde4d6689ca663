"""The connector's figures on vLLM's own way: its log line "KV Transfer metrics", and its ``/metrics``."""

from __future__ import annotations

import dataclasses
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

from kvstrata.integrations.vllm.moves import Moves

METRICS = {
    "loads": ("vllm:kvstrata_loads", "Requests whose hit was loaded."),
    "failed_loads": (
        "vllm:kvstrata_failed_loads",
        "Requests whose hit could not be loaded, and was recomputed.",
    ),
    "load_tokens": ("vllm:kvstrata_load_tokens", "Tokens loaded; once per worker."),
    "load_bytes": ("vllm:kvstrata_load_bytes", "Bytes copied from the cache, of all workers."),
    "load_seconds": ("vllm:kvstrata_load_seconds", "Seconds that took, of all workers."),
    "stores": ("vllm:kvstrata_stores", "Steps that stored something, of all workers."),
    "store_tokens": ("vllm:kvstrata_store_tokens", "Tokens stored; once per worker."),
    "store_bytes": ("vllm:kvstrata_store_bytes", "Bytes copied to the cache, of all workers."),
    "store_seconds": ("vllm:kvstrata_store_seconds", "Seconds that took, of all workers."),
}
"""Field of :class:`Moves` -> name and description of its counter."""


class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """Sums of :class:`Moves`, as vLLM carries them from workers to its loggers: a dict of numbers."""

    data: dict[str, Any]

    @classmethod
    def of(cls, moves: Moves) -> ConnectorStats:
        """What a worker did since the last step."""
        return cls(data=dataclasses.asdict(moves))

    def reset(self) -> None:
        """Forget everything."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Add another worker's, or another step's."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log line."""
        shown: dict[str, int | float] = {}
        for move in ("load", "store"):
            seconds, num_bytes = self.data.get(f"{move}_seconds", 0.0), self.data.get(f"{move}_bytes", 0)
            shown[f"{move} tokens"] = self.data.get(f"{move}_tokens", 0)
            shown[f"{move} MB/s"] = round(num_bytes / seconds / 1e6, 1) if seconds else 0.0
        shown["failed loads"] = self.data.get("failed_loads", 0)
        return shown

    def is_empty(self) -> bool:
        """Whether nothing was moved."""
        return not any(self.data.values())


class ConnectorMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters on vLLM's ``/metrics``, one per engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for field, (name, text) in METRICS.items():
            counter: Any = metric_types[Counter]
            family = counter(name=name, documentation=text, labelnames=labelnames)
            self._counters[field] = {
                engine: family.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count what :class:`ConnectorStats` carried."""
        for field, value in transfer_stats_data.items():
            if field in self._counters:
                self._counters[field][engine_idx].inc(value)
