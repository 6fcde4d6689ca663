"""A real vLLM over several backends, each taken away in turn: answers stay, the next one serves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_engine import Engine, assert_equal_answers

from kvstrata.testing.redis_cluster import RedisCluster
from kvstrata.testing.redis_sentinel import RedisSentinel
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.testing.vllm_client import Completion
from kvstrata.testing.waiting import repeating, wait_until

ARGS = ["--block-size", "32", "--max-model-len", "1024"]
CONFIG = ["maxmemory 512mb", "maxmemory-policy allkeys-lru"]
ANSWER_SECONDS = 60.0
"""No answer may take longer, whatever is taken away."""


class Requests:
    """The same prompts again and again; every answer is compared with the first one."""

    def __init__(self, engine: Engine, prompts: list[list[int]]) -> None:
        self._engine = engine
        self._prompts = prompts
        self._expected = [self._complete(prompt) for prompt in prompts]

    def _complete(self, prompt: list[int]) -> Completion:
        return self._engine.complete(prompt, max_tokens=4, ignore_eos=True, timeout_seconds=ANSWER_SECONDS)

    def repeat(self) -> list[Completion]:
        answers = [self._complete(prompt) for prompt in self._prompts]
        for want, got in zip(self._expected, answers, strict=True):
            assert_equal_answers(want, got)
        return answers

    def come_from(self, tier: str) -> bool:
        """Whether a repeat is answered from ``tier`` alone, all but the last token of each prompt."""
        before = self._engine.hit_tokens()
        answers = self.repeat()
        gained = {name: count - before[name] for name, count in self._engine.hit_tokens().items()}
        return gained[tier] > 0 and all(
            answer.cached_tokens == len(prompt) - 1
            for answer, prompt in zip(answers, self._prompts, strict=True)
        )

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Requests go on while the block runs, and at least one more time."""
        with repeating(self.repeat):
            yield
        self.repeat()


def test_each_backend_is_taken_away(model: Path, corpus: list[int], tmp_path: Path) -> None:
    """Sentinel, cluster and lm:// below vLLM: a failover and the loss of a node under load, then of all of each."""
    prompts = [corpus[start : start + 300] for start in range(60_000, 62_000, 500)]
    with (
        RedisSentinel(CONFIG) as sentinel,
        RedisCluster(config=CONFIG) as cluster,
        RemoteServerThread() as remote,
    ):
        tiers = [
            {"name": "sentinel", "url": sentinel.url},
            {"name": "cluster", "url": cluster.url},
            {"name": "lm", "url": remote.url},
        ]
        common = {"timeout_seconds": 1, "connect_timeout_seconds": 0.5}
        extra = {
            "chunk_size": 64,
            "local_cpu": False,
            "gate": False,
            "lookup_timeout_ms": 2000,
            "tiers": [{**common, **tier} for tier in tiers],
        }
        args = [*ARGS, "--no-enable-prefix-caching"]
        with Engine(model, tmp_path / "vllm.log", extra=extra, args=args) as engine:
            requests = Requests(engine, prompts)
            wait_until(
                lambda: all(tier["queued_bytes"] == 0 for tier in engine.stats()["tiers"]),
                "all is written",
                60,
            )
            wait_until(lambda: requests.come_from("sentinel"), "Sentinel serves", 60)

            with requests.in_flight():
                old = sentinel.master
                old.kill()
                sentinel.wait_for_other_master(old)
            wait_until(lambda: requests.come_from("sentinel"), "Sentinel serves", 60)

            for server in sentinel.servers:
                server.kill()
            wait_until(lambda: requests.come_from("cluster"), "the cluster serves", 60)

            with requests.in_flight():
                cluster.nodes[0].kill()
                time.sleep(1.0)
            cluster.nodes[0].start()
            wait_until(lambda: requests.come_from("cluster"), "the cluster serves", 60)

            for node in cluster.nodes:
                node.kill()
            wait_until(lambda: requests.come_from("lm"), "lm:// serves", 60)
