"""A real vLLM while its cache server and its Redis are killed at random instants: nothing wrong, hung or left."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vllm_engine import Engine, assert_equal_answers

from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.waiting import wait_until

ARGS = ["--block-size", "32", "--max-model-len", "1024"]
NUM_ROUNDS = 20
SEED = 7
ANSWER_SECONDS = 60.0
"""No answer may take longer, whatever is killed; without faults one takes about a second."""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def embedded_server(engine: Engine) -> int | None:
    """The process id of the engine's private cache server."""
    pids = [pid for pid in engine.process.processes() if "kvstrata.server.embedded" in _command(pid)]
    return pids[0] if pids else None


class Killer(threading.Thread):
    """Kills one thing after a random pause."""

    def __init__(self, kill: Callable[[], None], pause_seconds: float) -> None:
        super().__init__()
        self._kill = kill
        self._pause_seconds = pause_seconds

    def run(self) -> None:
        time.sleep(self._pause_seconds)
        self._kill()


def test_killed_at_random_instants(model: Path, corpus: list[int], tmp_path: Path) -> None:
    """Twenty rounds, each with a kill -9 of the cache server or of Redis while requests run."""
    rng = random.Random(SEED)
    prompts = [corpus[start : start + 250] for start in range(30_000, 30_000 + 5 * 300, 300)]
    extra = {"chunk_size": 64, "lookup_timeout_ms": 1000}

    with (
        RedisServer(["save ''", "maxmemory 1gb"]) as redis_server,
        Engine(
            model, tmp_path / "vllm.log", extra={**extra, "remote_url": redis_server.url}, args=ARGS
        ) as engine,
    ):
        expected = [engine.complete(prompt, max_tokens=4, ignore_eos=True) for prompt in prompts]

        def kill_server() -> None:
            pid = embedded_server(engine)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)

        for number in range(NUM_ROUNDS):
            kill = redis_server.kill if number % 2 else kill_server
            killer = Killer(kill, rng.uniform(0.0, 1.0))
            killer.start()
            try:
                for index in rng.sample(range(len(prompts)), 3):
                    answer = engine.complete(
                        prompts[index], max_tokens=4, ignore_eos=True, timeout_seconds=ANSWER_SECONDS
                    )
                    assert_equal_answers(expected[index], answer)
            finally:
                killer.join()
            if number % 2:
                redis_server.start()

        def hits_again() -> bool:
            answer = engine.complete(prompts[0], max_tokens=4, ignore_eos=True)
            assert_equal_answers(expected[0], answer)
            return answer.cached_tokens == len(prompts[0]) - 1

        wait_until(hits_again, "the cache is used again", 60)
        _kill_a_worker(engine)


def _kill_a_worker(engine: Engine) -> None:
    """vLLM ends when its worker is killed; our server ends with it."""
    server = embedded_server(engine)
    assert server is not None
    workers = engine.worker_pids()
    assert workers
    engine.process.kill(signal.SIGKILL, processes=workers[:1])
    wait_until(lambda: not _command(server), "the server is gone", 60)


def test_full_and_hanging_redis(model: Path, corpus: list[int], tmp_path: Path) -> None:
    """A Redis that is full, then one that hangs: requests go on, and it is used again when it is back."""
    config = ["save ''", "maxmemory 8mb", "maxmemory-policy noeviction"]
    extra = {"chunk_size": 64, "lookup_timeout_ms": 1000, "blocking_timeout_secs": 1, "local_cpu": False}
    prompts = [corpus[start : start + 400] for start in (40_000, 41_000, 42_000)]
    with (
        RedisServer(config) as redis_server,
        Engine(
            model, tmp_path / "vllm.log", extra={**extra, "remote_url": redis_server.url}, args=ARGS
        ) as engine,
    ):
        expected = [engine.complete(prompt, max_tokens=4, ignore_eos=True) for prompt in prompts]
        wait_until(
            lambda: engine.stats()["totals"]["tier_write_drops"]["redis"] > 0, "writes are dropped", 60
        )
        for prompt, want in zip(prompts, expected, strict=True):
            assert_equal_answers(want, engine.complete(prompt, max_tokens=4, ignore_eos=True))
        redis_server.suspend()
        for prompt, want in zip(prompts, expected, strict=True):
            answer = engine.complete(prompt, max_tokens=4, ignore_eos=True, timeout_seconds=ANSWER_SECONDS)
            assert_equal_answers(want, answer)
        assert not engine.stats()["tiers"][0]["up"]
        redis_server.resume()
        wait_until(lambda: bool(engine.stats()["tiers"][0]["up"]), "the tier is used again", 60)
        before = engine.hit_tokens()["redis"]
        assert_equal_answers(expected[0], engine.complete(prompts[0], max_tokens=4, ignore_eos=True))
        assert engine.hit_tokens()["redis"] > before
