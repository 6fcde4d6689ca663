"""``gate``: what load-or-recompute does to the time to the first token, over links of several speeds.

One real vLLM with our connector, and a real Redis behind the TCP proxy of the test kit, which sets the speed of
the link. The prompts are stored once. Then nothing more is stored, L1 is emptied before each request, and the mode
of the gate is changed while the server runs: ``auto``, ``never`` (recompute) and ``always`` meet the same engine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from kvstrata.bench.engines import KEY_PREFIX, CacheServer, valkey
from kvstrata.bench.prompts import prompts_apart
from kvstrata.bench.report import Environment, Report, Target, environment, median
from kvstrata.errors import ServerUnavailable
from kvstrata.testing.model import ModelError, smollm2, tokenize
from kvstrata.testing.process import ServerFailed, free_port
from kvstrata.testing.proxy import Link, Proxy, slow_link
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.vllm_client import VLLMClient
from kvstrata.testing.vllm_server import VLLMServer

_TARGETS = {
    "auto_over_recompute": Target(at_most=1.05),
    "auto_over_always_fast": Target(at_most=1.1),
}
_ROUND_TRIP_SECONDS = 0.002
_PATIENCE_SECONDS = 600.0
_POLL_SECONDS = 0.05


class GateConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    prompt_tokens: int = 1500
    prompts: int = 2
    """Different prompts, sent in turn; one more is warm-up."""
    pairs: int = 6
    """At each speed, of a request with ``auto`` and one with ``never``; half as many of ``always`` and ``auto``."""
    speeds: tuple[float, ...] = (10.0, 1.25, 0.8, 0.2)
    """Of the link, as multiples of the one at which loading takes as long as computing. The fastest first: an
    estimate that says "recompute" is only tried again after a minute."""
    pause_seconds: float = 1.0
    """Before each request. vLLM's worker processes spin for a second after one, and take a core from others."""
    answer_tokens: int = 1
    model: str | None = None
    """Folder of the model; SmolLM2-135M by default."""
    cache_dir: str = ".cache"


class Sample(msgspec.Struct, frozen=True):
    """One request."""

    ttft_seconds: float
    hit_tokens: int
    verdict: str
    """What the gate said: ``load``, ``trial``, ``recompute``; ``-`` when it was not asked."""


@dataclass
class Measured:
    """What was measured at one speed. Pairs are neighbours: ``auto[i]`` next to ``never[i]``."""

    speed: float
    bytes_per_second: float
    first: Sample
    """The first request with ``auto`` after the speed has changed: its estimate is of the speed before."""
    auto: list[Sample] = field(default_factory=list)
    never: list[Sample] = field(default_factory=list)
    always: list[Sample] = field(default_factory=list)
    auto_beside_always: list[Sample] = field(default_factory=list)

    @property
    def over_recompute(self) -> list[float]:
        """The ratios of the pairs."""
        return [a.ttft_seconds / b.ttft_seconds for a, b in zip(self.auto, self.never, strict=True)]

    @property
    def over_always(self) -> list[float]:
        """The ratios of the other pairs."""
        pairs = zip(self.auto_beside_always, self.always, strict=True)
        return [a.ttft_seconds / b.ttft_seconds for a, b in pairs]


@dataclass(frozen=True)
class Engine:
    """A vLLM, the cache server behind its connector, and the link between that and its Redis."""

    vllm: VLLMClient
    cache: CacheServer
    http_port: int
    proxy: Proxy

    def change(self, **wanted: Any) -> None:
        """Change what can be changed while the cache server runs."""
        self._ask("PATCH", "/runtime", wanted)

    def last_decisions(self) -> list[dict[str, Any]]:
        """What the gate said to the last look-up."""
        decisions: list[dict[str, Any]] = self._ask("GET", "/requests?limit=1")[0]["decisions"]
        return decisions

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=30)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"content-type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != 200:
            raise ServerUnavailable(f"{method} {path} was answered {response.status}: {answer}")
        return answer


def run(config: GateConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure.

    Raises:
        ServerUnavailable, OSError: a server cannot be started, or failed.
    """
    machine = environment()
    try:
        with started(config, progress) as (engine, model):
            measured = measure(config, engine, model, progress)
    except (ServerFailed, ModelError) as error:
        raise ServerUnavailable(str(error)) from error
    return _report(config, machine, measured)


@contextlib.contextmanager
def started(config: GateConfig, progress: Callable[[str], None]) -> Iterator[tuple[Engine, Path]]:
    """Start everything; end it all on exit.

    Deadlines are long and one thread reads from Redis, so that ``always`` waits for all of a load, and its speed is
    that of the link.

    Raises:
        ServerFailed, ModelError, ServerUnavailable: something cannot be started.
    """
    cache_dir = Path(config.cache_dir).resolve()
    model = smollm2(cache_dir) if config.model is None else Path(config.model)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstrata-bench-"))
        redis = stack.enter_context(
            RedisServer(("maxmemory 2gb", "maxmemory-policy allkeys-lru"), binary=valkey())
        )
        proxy = stack.enter_context(Proxy(("127.0.0.1", redis.port)))
        http_port = free_port()
        tier = {"url": f"redis://{proxy.address}", "key_prefix": KEY_PREFIX, "num_workers": 3}
        settings = {
            "max_local_cpu_size": 1.0,
            "runtime_dir": directory,
            "http_port": http_port,
            "log_level": "WARNING",
            "lookup_timeout_ms": int(_PATIENCE_SECONDS * 1000),
            "tiers": [tier | {"timeout_seconds": _PATIENCE_SECONDS}],
        }
        connector = {
            "kv_connector": "KVStrataConnector",
            "kv_connector_module_path": "kvstrata.integrations.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings,
        }
        log_path = cache_dir / "logs" / "bench-gate.log"
        progress(f"starting a vLLM (log in {log_path})")
        vllm = stack.enter_context(VLLMServer(model, log_path=log_path, connector=connector))
        (control,) = Path(directory).glob("embedded-*/control.sock")
        cache = CacheServer(f"ipc://{control}")
        stack.callback(cache.close)
        yield Engine(vllm, cache, http_port, proxy), model


def measure(
    config: GateConfig, engine: Engine, model: Path, progress: Callable[[str], None]
) -> list[Measured]:
    """Store the prompts over an open link, then go through the speeds."""
    prompts = prompts_apart(partial(tokenize, model), config.prompts + 1, config.prompt_tokens)
    salt = uuid.uuid4().hex
    progress("storing the prompts")
    for prompt in prompts:
        engine.vllm.complete(prompt, max_tokens=1, cache_salt=salt)
    engine.cache.drain()
    num_bytes = engine.cache.held_bytes() / len(prompts)
    engine.change(stores_frozen=True)
    session = _Session(config, engine, prompts[1:], salt)
    prefill_seconds = median([session.ask("never", prompt).ttft_seconds for prompt in prompts])
    measured = []
    for speed in config.speeds:
        bytes_per_second = speed * num_bytes / prefill_seconds
        progress(f"a link of {bytes_per_second / 1e6:.1f} MB/s: {speed:g} of break-even")
        engine.proxy.link = slow_link(_ROUND_TRIP_SECONDS, bytes_per_second)
        measured.append(session.measure(speed, bytes_per_second))
    engine.proxy.link = Link()
    return measured


class _Session:
    """Sends requests with one mode of the gate or another."""

    def __init__(self, config: GateConfig, engine: Engine, prompts: list[list[int]], salt: str) -> None:
        self._config = config
        self._engine = engine
        self._prompts = prompts
        self._salt = salt

    def measure(self, speed: float, bytes_per_second: float) -> Measured:
        """One speed. ``always`` comes last: its loads would keep the estimates of ``auto`` fresh."""
        measured = Measured(speed, bytes_per_second, self.ask("auto", self._prompts[0]))
        for number in range(self._config.pairs):
            self._pair(number, {"auto": measured.auto, "never": measured.never})
        for number in range(max(1, self._config.pairs // 2)):
            self._pair(number, {"auto": measured.auto_beside_always, "always": measured.always})
        return measured

    def _pair(self, number: int, into: dict[str, list[Sample]]) -> None:
        """Two neighbours that take turns in who is first."""
        prompt = self._prompts[number % len(self._prompts)]
        for mode in into if number // len(self._prompts) % 2 else reversed(into):
            into[mode].append(self.ask(mode, prompt))

    def ask(self, mode: str, prompt: list[int]) -> Sample:
        """One request of which L1 holds nothing; returns when nothing is being loaded any more."""
        engine = self._engine
        engine.cache.empty_l1()
        engine.change(gate=mode)
        time.sleep(self._config.pause_seconds)
        answer = engine.vllm.complete(prompt, max_tokens=self._config.answer_tokens, cache_salt=self._salt)
        decisions = self._wait_for_loads()
        verdict = ", ".join(decision["verdict"] for decision in decisions) or "-"
        return Sample(answer.ttft_seconds, answer.cached_tokens or 0, verdict)

    def _wait_for_loads(self) -> list[dict[str, Any]]:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline:
            decisions = self._engine.last_decisions()
            if all(d["verdict"] == "recompute" or d["actual_load_seconds"] is not None for d in decisions):
                return decisions
            time.sleep(_POLL_SECONDS)
        raise ServerUnavailable("a load has not ended in time")


def _report(config: GateConfig, machine: Environment, measured: list[Measured]) -> Report:
    rows: list[tuple[str | float | int | None, ...]] = []
    ratios: dict[str, float] = {"auto_over_recompute": max(median(each.over_recompute) for each in measured)}
    samples: dict[str, list[float]] = {}
    for each in measured:
        name = f"{each.speed:g}"
        kinds = {
            "auto": each.auto,
            "recompute": each.never,
            "always": each.always,
            "auto_beside_always": each.auto_beside_always,
        }
        seconds = {kind: [sample.ttft_seconds for sample in found] for kind, found in kinds.items()}
        recompute = median(seconds["recompute"])
        verdicts = [sample.verdict for sample in each.auto]
        rows.append(
            (
                name,
                each.bytes_per_second / 1e6,
                recompute,
                median(seconds["auto"]),
                median(seconds["always"]),
                median(each.over_recompute),
                max(each.over_recompute),
                median(each.over_always),
                each.first.ttft_seconds / recompute,
                ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)),
            )
        )
        ratios[f"auto_over_recompute_{name}"] = median(each.over_recompute)
        ratios[f"auto_over_always_{name}"] = median(each.over_always)
        samples |= {f"{kind}_{name}": found for kind, found in seconds.items()}
        samples[f"first_{name}"] = [each.first.ttft_seconds]
    fastest = max(measured, key=lambda each: each.speed)
    ratios["auto_over_always_fast"] = median(fastest.over_always)
    return Report(
        benchmark="gate",
        environment=machine,
        config=msgspec.to_builtins(config),
        method=_METHOD.format(config=config, fewer=max(1, config.pairs // 2)),
        columns=(
            "speed",
            "MB/s",
            "recompute s",
            "auto s",
            "always s",
            "auto/recompute",
            "highest",
            "auto/always",
            "first/recompute",
            "auto said",
        ),
        rows=tuple(rows),
        ratios=ratios,
        targets=_TARGETS,
        samples=samples,
    )


_METHOD = (
    "{config.prompts} prompts of {config.prompt_tokens} tokens of natural text, stored in Redis before. Seconds "
    "are times to the first token with L1 empty, {config.pause_seconds:g} s apart. The link to Redis has 'speed' "
    "times the bandwidth at which loading takes as long as computing took. At each speed: one request with gate: "
    "auto whose estimate is that of the speed before (first), then {config.pairs} pairs of auto and never "
    "(recompute), then {fewer} of auto and always, in turns. Ratios are medians of the ratios of neighbours; "
    "auto_over_recompute is the largest of them."
)
