"""The servers of ``gate`` and ``link``: a vLLM with our connector, and a Redis behind a link that can be made slow.

L1 is emptied before each request, so that what is asked for comes over the link or is computed.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from kvstrata.bench.engines import KEY_PREFIX, REDIS_CONFIG, CacheServer, EngineConfig, valkey
from kvstrata.bench.prompts import prompts_apart
from kvstrata.errors import ServerUnavailable
from kvstrata.testing.api import Api
from kvstrata.testing.model import ModelError, model_folder, tokenize
from kvstrata.testing.process import ServerFailed, free_port
from kvstrata.testing.proxy import Link, Proxy, slow_link
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.vllm_client import VLLMClient
from kvstrata.testing.vllm_server import VLLMServer, our_connector

_ROUND_TRIP_SECONDS = 0.002
_PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.05


class LinkedConfig(EngineConfig, frozen=True, kw_only=True):
    """What these benchmarks have in common."""

    prompt_tokens: int = 1500
    prompts: int = 2
    """Different prompts, sent in turn; one more is warm-up."""
    pause_seconds: float = 1.0
    answer_tokens: int = 1


class Sample(msgspec.Struct, frozen=True):
    """One request."""

    ttft_seconds: float
    hit_tokens: int
    verdict: str
    """What the gate said: ``load``, ``trial``, ``recompute``; ``-`` when it was not asked."""


@dataclass(frozen=True)
class LinkedEngine:
    """A vLLM, the cache server behind its connector, and the link between that and its Redis."""

    config: LinkedConfig
    vllm: VLLMClient
    cache: CacheServer
    api: Api
    proxy: Proxy
    prompts: Sequence[list[int]]
    """They share no prefix. The first is for warming up."""

    def limit(self, bytes_per_second: float | None) -> None:
        """Set the bandwidth of the link; None takes limit and latency away."""
        if bytes_per_second is None:
            self.proxy.link = Link()
        else:
            self.proxy.link = slow_link(_ROUND_TRIP_SECONDS, bytes_per_second, shared=True)

    def store(self) -> float:
        """Compute all prompts, and store them over the link. From then on nothing is stored any more.

        Returns:
            The bytes of a prompt's KV.
        """
        for prompt in self.prompts:
            self.vllm.complete(prompt, max_tokens=1)
            self.cache.drain()
        num_bytes = self.cache.held_bytes() / len(self.prompts)
        self.change(stores_frozen=True)
        return num_bytes

    def ask(self, mode: str, prompt: list[int]) -> Sample:
        """One request of which L1 holds nothing; returns when nothing is being loaded any more."""
        self.cache.empty_l1()
        self.change(gate=mode)
        return self.ask_again(prompt)

    def ask_again(self, prompt: list[int]) -> Sample:
        """One request, with what L1 holds."""
        time.sleep(self.config.pause_seconds)
        answer = self.vllm.complete(prompt, max_tokens=self.config.answer_tokens)
        verdict = ", ".join(decision["verdict"] for decision in self._decisions_of_ended_loads()) or "-"
        return Sample(answer.ttft_seconds, answer.cached_tokens or 0, verdict)

    def change(self, **wanted: Any) -> None:
        """Change what can be changed while the cache server runs."""
        self._request("PATCH", "/runtime", wanted)

    def _decisions_of_ended_loads(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            decisions: list[dict[str, Any]] = self._request("GET", "/requests?limit=1")[0]["decisions"]
            if all(d["verdict"] == "recompute" or d["actual_load_seconds"] is not None for d in decisions):
                return decisions
            time.sleep(_POLL_SECONDS)
        raise ServerUnavailable("a load has not ended in time")

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.api.ask(method, path, body)
        if answer.status != 200:
            raise ServerUnavailable(f"{method} {path} was answered {answer.status}: {answer.body!r}")
        return answer.json


@contextlib.contextmanager
def started(
    config: LinkedConfig,
    tiers: Sequence[Mapping[str, Any]],
    progress: Callable[[str], None],
    **settings: Any,
) -> Iterator[LinkedEngine]:
    """Start everything; end it all on exit.

    Deadlines are long, so that the gate's mode ``always`` waits for all of a load.

    Args:
        tiers: what each tier has besides the Redis that all are in; names differ.
        settings: of the cache server, besides those that are needed.

    Raises:
        ServerUnavailable, OSError: something cannot be started, or failed.
    """
    cache_dir = Path(config.cache_dir).resolve()
    try:
        with contextlib.ExitStack() as stack:
            model = model_folder(Path(config.model) if config.model else None, cache_dir)
            prompts = prompts_apart(partial(tokenize, model), config.prompts + 1, config.prompt_tokens)
            redis = stack.enter_context(RedisServer(REDIS_CONFIG, binary=valkey()))
            proxy = stack.enter_context(Proxy(("127.0.0.1", redis.port)))
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstrata-bench-"))
            http_port = free_port()
            settings |= {
                "max_local_cpu_size": 1.0,
                "runtime_dir": directory,
                "http_port": http_port,
                "log_level": "WARNING",
                "lookup_timeout_ms": int(_PATIENCE_SECONDS * 1000),
                "tiers": [_tier(number, tier, proxy) for number, tier in enumerate(tiers)],
            }
            log_path = cache_dir / "logs" / "bench-linked.log"
            progress(f"starting a vLLM (log in {log_path})")
            vllm = stack.enter_context(
                VLLMServer(model, log_path=log_path, connector=our_connector(settings))
            )
            (control,) = Path(directory).glob("embedded-*/control.sock")
            cache = stack.enter_context(contextlib.closing(CacheServer(f"ipc://{control}")))
            yield LinkedEngine(config, vllm, cache, Api("127.0.0.1", http_port), proxy, prompts)
    except (ServerFailed, ModelError) as error:
        raise ServerUnavailable(str(error)) from error


def _tier(number: int, tier: Mapping[str, Any], proxy: Proxy) -> dict[str, Any]:
    common = {"url": f"redis://{proxy.address}", "timeout_seconds": _PATIENCE_SECONDS}
    return {**common, "key_prefix": f"{KEY_PREFIX}{number}:", **tier}
