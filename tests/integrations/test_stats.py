"""The connector's figures, through vLLM's own classes that carry, log and export them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from simulated import expected_answer
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm

from kvstrata.integrations.vllm import KVStrataConnector
from kvstrata.integrations.vllm.moves import Moves
from kvstrata.integrations.vllm.stats import METRICS, ConnectorStats

PROMPT = [17 * n % 50_000 for n in range(1, 201)]
TRANSFER = KVTransferConfig(
    kv_connector="KVStrataConnector", kv_connector_module_path="kvstrata.integrations.vllm", kv_role="kv_both"
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The sum of what vLLM's model runner took from the workers."""
    total = ConnectorStats()
    take = KVStrataConnector.get_kv_connector_stats

    def recording(self):
        found = take(self)
        if found is not None:
            total.aggregate(found)
        return found

    monkeypatch.setattr(KVStrataConnector, "get_kv_connector_stats", recording)
    return total.data


def test_what_a_worker_moved_is_counted_once(make_engine, client, taken):
    engine = make_engine()
    assert engine.ask("cold", PROMPT, 2) == expected_answer(PROMPT, 2)
    assert (taken["store_tokens"], taken["loads"], taken["failed_loads"]) == (200, 0, 0)
    assert taken["store_seconds"] > 0
    engine.scheduler.reset_prefix_cache()
    assert engine.ask("warm", PROMPT, 2) == expected_answer(PROMPT, 2)
    assert (taken["loads"], taken["load_tokens"], taken["failed_loads"]) == (1, 199, 0)
    totals = client.stats()["totals"]["device_bytes"]
    assert totals == {"store": taken["store_bytes"], "retrieve": taken["load_bytes"]}
    assert totals["store"] > 0


def test_vllm_logs_the_sum_of_all_workers_and_steps():
    logged = []
    logging = KVConnectorLogging(TRANSFER)
    assert logging.connector_cls is KVStrataConnector
    for _ in range(3):
        moves = Moves()
        moves.add(100, 5_000_000, 0.5, is_store=True)
        moves.add(10, 1_000_000, 0.25, is_store=False)
        logging.observe(ConnectorStats.of(moves).to_dict())
    logging.log(lambda *said: logged.append(said[0] % said[1:]))
    assert logged == [
        "KV Transfer metrics: load tokens=30, load MB/s=4.0, store tokens=300, store MB/s=10.0, failed loads=0"
    ]
    logging.log(lambda *said: logged.append(said))
    assert len(logged) == 1
    assert ConnectorStats.of(Moves()).is_empty()


def test_vllm_exports_them_on_its_own_metrics(monkeypatch: pytest.MonkeyPatch):
    registry = CollectorRegistry()

    def in_registry(kind):
        return lambda **arguments: kind(**arguments, registry=registry)

    for name, kind in (("_counter_cls", Counter), ("_gauge_cls", Gauge), ("_histogram_cls", Histogram)):
        monkeypatch.setattr(KVConnectorProm, name, staticmethod(in_registry(kind)))
    labels = ["model_name", "engine"]
    prom = KVConnectorProm(
        SimpleNamespace(kv_transfer_config=TRANSFER), labels, {0: ["m", "0"], 1: ["m", "1"]}
    )
    moves = Moves(failed_loads=2)
    moves.add(100, 5000, 0.5, is_store=False)
    prom.observe(ConnectorStats.of(moves).to_dict(), engine_idx=1)
    prom.observe(ConnectorStats.of(moves).to_dict(), engine_idx=1)
    found = {
        engine: registry.get_sample_value(
            "vllm:kvstrata_load_bytes_total", {"model_name": "m", "engine": engine}
        )
        for engine in ("0", "1")
    }
    assert found == {"0": 0, "1": 10_000}
    one = {"model_name": "m", "engine": "1"}
    assert registry.get_sample_value("vllm:kvstrata_failed_loads_total", one) == 4
    for name, _ in METRICS.values():
        assert registry.get_sample_value(f"{name}_total", one) is not None
