"""The ways to run it: embedded, server, roles, tensor parallelism, other KV arrangements, kill -9."""

from __future__ import annotations

import json
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import Engine, assert_equal_answers

from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.waiting import wait_until

SHORT = ["--max-model-len", "1024"]
SMALL_BLOCKS = ["--block-size", "32", *SHORT]


def test_embedded_end_to_end(model: Path, corpus: list[int], tmp_path: Path) -> None:
    """The log lines people grep for, a repeated prompt of 50 tokens, switches, reset, and kill -9 of vLLM."""
    with Engine(model, tmp_path / "vllm.log", extra={"chunk_size": 256}, args=SHORT) as engine:
        prompt = corpus[:50]
        first = engine.complete(prompt, max_tokens=8)
        second = engine.complete(prompt, max_tokens=8)
        assert_equal_answers(first, second)
        log = engine.log()
        assert "Total tokens 50, KVStrata hit tokens: 0, need to load: 0" in log
        assert "Storing KV cache for 50 out of 50 tokens for request" in log
        assert "Stored 50 tokens in" in log
        assert "Total tokens 50, KVStrata hit tokens: 49, need to load: 49" in log
        assert "Retrieved 49 tokens in" in log
        assert second.cached_tokens == 49

        long = corpus[100:700]
        skipped = engine.complete(long, max_tokens=8, kv_transfer_params={"kvstrata.skip_write": True})
        again = engine.complete(long, max_tokens=8)
        assert not again.cached_tokens
        third = engine.complete(long, max_tokens=8, kv_transfer_params={"kvstrata.skip_read": True})
        assert not third.cached_tokens
        salted = engine.complete(long, max_tokens=8, cache_salt="tenant-b")
        assert not salted.cached_tokens
        for answer in (again, third, salted, engine.complete(long, max_tokens=8)):
            assert_equal_answers(skipped, answer)

        pids = engine.process.processes()
        server = [pid for pid in pids if "kvstrata.server.embedded" in _command(pid)]
        assert len(server) == 1
        engine.kill9()
        wait_until(lambda: not _exists(server[0]), "the server is gone", 60)
    assert not [path for path in Path("/dev/shm").iterdir() if "kvstrata" in path.name]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    return bool(_command(pid))


class CacheServer(ServerProcess):
    """``kvstrata server`` as a user starts it."""

    def __init__(self, directory: Path, port: int, http_port: int, *options: str) -> None:
        self.http_port = http_port
        command = [sys.executable, "-m", "kvstrata.cli", "server", "--l1-size-gb", "0.5", "--port", str(port)]
        command += ["--eviction-policy", "LRU", "--chunk-size", "64", "--http-port", str(http_port), *options]
        super().__init__(
            "kvstrata server",
            command,
            log_path=directory / "server.log",
            env={"KVSTRATA_RUNTIME_DIR": str(directory / "run")},
            ready=self.healthy,
            start_timeout_seconds=60,
        )

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/health", timeout=2) as answer:
                return bool(json.load(answer)["status"] == "ok")
        except OSError:
            return False

    def hit_tokens(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/stats", timeout=5) as answer:
            return int(json.load(answer)["totals"]["hit_tokens"]["l1"])


def test_server_mode_survives_absence_and_restart(model: Path, corpus: list[int], tmp_path: Path) -> None:
    """vLLM starts before the server, and goes on while it is killed and started again."""
    port, http_port = free_port(), free_port()
    extra = {"server_url": f"tcp://127.0.0.1:{port}", "http_port": None}
    with Engine(model, tmp_path / "vllm.log", extra=extra, args=SMALL_BLOCKS) as engine:
        prompt = corpus[1000:1300]
        expected = engine.complete(prompt, max_tokens=8)
        for _ in range(2):
            with CacheServer(tmp_path, port, http_port) as server:

                def stored_and_hit(server: CacheServer = server) -> bool:
                    answer = engine.complete(prompt, max_tokens=8)
                    assert_equal_answers(expected, answer)
                    return answer.cached_tokens == 299 and server.hit_tokens() > 0

                wait_until(stored_and_hit, "the cache is used", 60)
                server.kill(signal.SIGKILL)
                answer = engine.complete(prompt, max_tokens=8)
                assert_equal_answers(expected, answer)
                assert not answer.cached_tokens
    assert "chunks of 64 tokens" in engine.log()


def test_tensor_parallel(tiny_model: Path, tmp_path: Path) -> None:
    """Two ranks: a hit needs both shards, and brings each rank its own."""
    args = ["--tensor-parallel-size", "2", *SMALL_BLOCKS]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    extra = {"chunk_size": 64, "local_disk": str(tmp_path / "disk")}
    prompt = [7 + (i * i) % 900 for i in range(300)]
    with Engine(tiny_model, tmp_path / "vllm.log", extra=extra, args=args, env=env) as engine:
        expected = engine.complete(prompt, max_tokens=4)
        answer = engine.complete(prompt, max_tokens=4)
        assert_equal_answers(expected, answer)
        assert answer.cached_tokens == 299
        workers = {path.parts[-3] for path in (tmp_path / "disk").rglob("*") if path.is_file()}
        assert len(workers) >= 2, workers
    assert "Retrieved 299 tokens" in engine.log()


@pytest.fixture(params=["fp8", "prefix-cache-and-chunked-prefill"])
def arrangement(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    if request.param == "fp8":
        yield {"args": ["--kv-cache-dtype", "fp8", *SMALL_BLOCKS]}
    else:
        yield {"args": ["--max-num-batched-tokens", "128", *SMALL_BLOCKS], "prefix_caching": True}


def test_other_arrangements(
    arrangement: dict[str, Any], model: Path, corpus: list[int], tmp_path: Path
) -> None:
    """fp8 pages; vLLM's own prefix cache with chunked prefill: only what it lacks is loaded."""
    with Engine(model, tmp_path / "vllm.log", extra={"chunk_size": 100}, **arrangement) as engine:
        prompt = corpus[2000:2600]
        expected = engine.complete(prompt, max_tokens=8)
        assert "chunks have 128 tokens" in engine.log()
        engine.reset_prefix_cache()
        assert_equal_answers(expected, engine.complete(prompt, max_tokens=8))
        longer = [*prompt, *corpus[5000:5200]]
        loaded = engine.complete(longer, max_tokens=8)
        assert loaded.cached_tokens
        engine.reset_prefix_cache()
        fresh = engine.complete(longer, max_tokens=8, kv_transfer_params={"kvstrata.skip_read": True})
        assert_equal_answers(fresh, loaded)


def test_producer_and_consumer_share_a_server(model: Path, corpus: list[int], tmp_path: Path) -> None:
    """One engine only stores, another only retrieves, over one server."""
    port, http_port = free_port(), free_port()
    extra = {"server_url": f"tcp://127.0.0.1:{port}", "http_port": None}
    prompt = corpus[6000:6300]
    with CacheServer(tmp_path, port, http_port):
        producer = Engine(model, tmp_path / "p.log", role="kv_producer", extra=extra, args=SMALL_BLOCKS)
        consumer = Engine(model, tmp_path / "c.log", role="kv_consumer", extra=extra, args=SMALL_BLOCKS)
        try:
            producer.launch()
            consumer.launch()
            producer.wait_until_ready()
            consumer.wait_until_ready()
            cold = consumer.complete(prompt, max_tokens=8)
            assert not consumer.complete(prompt, max_tokens=8).cached_tokens
            assert_equal_answers(cold, producer.complete(prompt, max_tokens=8))
            assert not producer.complete(prompt, max_tokens=8).cached_tokens
            warm = consumer.complete(prompt, max_tokens=8)
            assert warm.cached_tokens == 299
            assert_equal_answers(cold, warm)
        finally:
            producer.stop()
            consumer.stop()
