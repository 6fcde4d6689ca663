"""``ttft``: the time to the first token of a real vLLM: cold, warm from each tier, against vLLM without us.

Two vLLMs run side by side, one without connector and one with ours; only one works at a time, and they take
turns, because a machine drifts more within minutes than the differences that are to be seen. What a warm answer
came from is checked against the cache server's own count of hit tokens.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from kvstrata.bench.engines import CacheServer, EngineConfig, Engines, running, started
from kvstrata.bench.prompts import prompts_apart
from kvstrata.bench.report import Environment, Report, Target, environment, median
from kvstrata.errors import ServerUnavailable
from kvstrata.testing.model import ModelError
from kvstrata.testing.process import ServerFailed
from kvstrata.testing.vllm_client import VLLMClient

_TARGETS = {
    "l1_over_native": Target(at_most=1.15),
    "redis_over_native": Target(at_most=1.6),
    "disk_over_native": Target(at_most=1.6),
    "cold_over_none": Target(at_most=1.03),
}
_MIN_HIT_SHARE = 0.9


class TTFTConfig(EngineConfig, frozen=True, kw_only=True):
    """What to measure."""

    prompt_tokens: int = 3500
    prompts: int = 4
    """Different prompts, each sent cold once to each vLLM; one more is warm-up."""
    repeats: int = 3
    """Warm requests per prompt and tier, each next to a hit in vLLM's own prefix cache."""
    answer_tokens: int = 4
    pause_seconds: float = 2.0
    redis_url: str | None = None
    url: str | None = None
    """A running vLLM with our connector, instead of starting two."""
    plain_url: str | None = None
    """A running vLLM without connector."""
    cache_endpoint: str | None = None
    """Where the running vLLM's cache server listens."""


class Prompt(msgspec.Struct, frozen=True):
    """A prompt that no server has seen before."""

    tokens: list[int]
    salt: str
    """Its ``cache_salt``: makes it new also to a server that was measured before."""


@dataclass
class Pairs:
    """Requests to our vLLM, each with the one it is compared with. Seconds to the first token."""

    ours: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    hit_tokens: list[int] = field(default_factory=list)

    def add(self, ours: float, reference: float, hit_tokens: int) -> None:
        self.ours.append(ours)
        self.reference.append(reference)
        self.hit_tokens.append(hit_tokens)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.reference, strict=True)]


@dataclass
class Measured:
    """All pairs, by what our vLLM had to start from."""

    pairs: dict[str, Pairs] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, name: str) -> Pairs:
        return self.pairs.setdefault(name, Pairs())


def run(config: TTFTConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure.

    Raises:
        ConfigError: a URL is none.
        ServerUnavailable, OSError: a server cannot be started, or failed.
    """
    machine = environment()
    try:
        with _engines(config, progress) as engines:
            measured = measure(config, engines, progress)
    except (ServerFailed, ModelError) as error:
        raise ServerUnavailable(str(error)) from error
    return _report(config, machine, measured)


@contextlib.contextmanager
def _engines(config: TTFTConfig, progress: Callable[[str], None]) -> Iterator[Engines]:
    if config.url is not None:
        with running(
            config.url,
            plain_url=config.plain_url,
            cache_endpoint=config.cache_endpoint,
        ) as engines:
            yield engines
        return
    model = None if config.model is None else Path(config.model)
    with started(
        model=model, cache_dir=Path(config.cache_dir), redis_url=config.redis_url, progress=progress
    ) as engines:
        yield engines


def measure(config: TTFTConfig, engines: Engines, progress: Callable[[str], None]) -> Measured:
    """Send one prompt after the other through all phases."""
    prompts = _prompts(config, engines)
    progress("warm-up: one prompt through everything")
    warm_up = msgspec.structs.replace(config, repeats=1)
    Session(warm_up, engines, Measured()).measure(prompts[0], ours_first=True)
    session = Session(config, engines, Measured())
    for number, prompt in enumerate(prompts[1:], 1):
        progress(f"prompt {number} of {config.prompts}")
        session.measure(prompt, ours_first=bool(number % 2))
    return session.measured


def _prompts(config: TTFTConfig, engines: Engines) -> list[Prompt]:
    """Natural texts that share no prefix, each new to every server."""
    texts = prompts_apart(engines.tokenize, config.prompts + 1, config.prompt_tokens)
    return [Prompt(tokens, uuid.uuid4().hex) for tokens in texts]


class Session:
    """Sends one prompt after the other through all phases, and keeps what was measured."""

    def __init__(self, config: TTFTConfig, engines: Engines, measured: Measured) -> None:
        self._config = config
        self._engines = engines
        self.measured = measured

    def measure(self, prompt: Prompt, *, ours_first: bool) -> None:
        """All phases of one prompt that nobody has seen before."""
        cache = self._engines.cache
        self._cold(prompt, ours_first=ours_first)
        if cache is None:
            self._warm("l1", prompt)
            return
        cache.drain()
        self._warm("l1", prompt)
        above: list[str] = []
        for tier in cache.tiers():
            if not all(cache.empty_tier(name) for name in above):
                return  # they would answer for this one, too
            self._warm(tier, prompt, prepare=partial(_empty, cache, tuple(above)))
            above.append(tier)

    def _cold(self, prompt: Prompt, *, ours_first: bool) -> None:
        plain = self._engines.plain
        if plain is None:
            self._ask_ours(prompt)
            return
        if ours_first:
            ours = self._ask_ours(prompt)
            self._drain()
            reference = self._ask_plain(prompt)
        else:
            reference = self._ask_plain(prompt)
            ours = self._ask_ours(prompt)
        self.measured.of("cold").add(ours, reference, 0)

    def _warm(self, tier: str, prompt: Prompt, prepare: Callable[[], None] = lambda: None) -> None:
        """Warm from ``tier``, each time next to a hit in vLLM's own prefix cache."""
        for number in range(self._config.repeats):
            # Taking turns also in who is first.
            reference = self._ask_plain(prompt) if number % 2 else None
            prepare()
            before = self._hit_tokens(tier)
            ours = self._ask_ours(prompt)
            after = self._hit_tokens(tier)
            self._drain()
            reference = reference or self._ask_plain(prompt)
            hit = len(prompt.tokens) if before is None or after is None else after - before
            if hit < _MIN_HIT_SHARE * len(prompt.tokens):
                self.measured.notes.append(
                    f"{tier}: a request hit {hit} of {len(prompt.tokens)} tokens; left out"
                )
            else:
                self.measured.of(tier).add(ours, reference, hit)

    def _hit_tokens(self, tier: str) -> int | None:
        cache = self._engines.cache
        return None if cache is None else cache.hit_tokens().get(tier, 0)

    def _drain(self) -> None:
        if self._engines.cache is not None:
            self._engines.cache.drain()

    def _ask_ours(self, prompt: Prompt) -> float:
        """Our vLLM, with its own prefix cache empty."""
        self._engines.ours.reset_prefix_cache()
        return self._ask(self._engines.ours, prompt)

    def _ask_plain(self, prompt: Prompt) -> float:
        """vLLM without us; without one, ours with its own prefix cache left alone."""
        return self._ask(self._engines.plain or self._engines.ours, prompt)

    def _ask(self, server: VLLMClient, prompt: Prompt) -> float:
        time.sleep(self._config.pause_seconds)
        answer = server.complete(prompt.tokens, max_tokens=self._config.answer_tokens, cache_salt=prompt.salt)
        return answer.ttft_seconds


def _empty(cache: CacheServer, tiers: Sequence[str]) -> None:
    """Leave a prompt to the tiers below ``tiers``. Each hit there has filled these again."""
    for tier in tiers:
        cache.empty_tier(tier)
    cache.empty_l1()


def _report(config: TTFTConfig, machine: Environment, measured: Measured) -> Report:
    rows: list[tuple[str | float | int | None, ...]] = []
    ratios: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for name, pairs in measured.pairs.items():
        against = "none" if name == "cold" else "native"
        values = pairs.ratios
        ratios[f"{name}_over_{against}"] = median(values)
        rows.append(
            (
                name,
                len(values),
                median(pairs.ours),
                median(pairs.reference),
                median(values),
                min(values),
                max(values),
                median(pairs.hit_tokens),
            )
        )
        samples |= {name: pairs.ours, f"{name}_{against}": pairs.reference}
    return Report(
        benchmark="ttft",
        environment=machine,
        config=msgspec.to_builtins(config),
        method=_METHOD.format(config=config),
        columns=("from", "n", "TTFT s", "reference s", "ratio", "lowest", "highest", "hit tokens"),
        rows=tuple(rows),
        ratios=_ordered(ratios),
        targets=_TARGETS,
        notes=tuple(measured.notes),
        samples=samples,
    )


_METHOD = (
    "{config.prompts} prompts of {config.prompt_tokens} tokens of natural text, after one of warm-up. Two vLLMs "
    "take turns on the same machine, {config.pause_seconds:g} s apart: one without connector (the reference: its "
    "cold TTFT for cold, a hit in its own prefix cache for the others), one with ours in embedded mode, Redis and "
    "disk below L1. Before each request to ours its own prefix cache is emptied; for redis and disk L1 too, for "
    "disk our keys in Redis as well. {config.repeats} requests per prompt and tier; ratios are medians of the "
    "ratios of neighbours."
)


def _ordered(ratios: dict[str, float]) -> dict[str, float]:
    """Those with a target first, in the order of the targets."""
    return {name: ratios[name] for name in [*_TARGETS, *ratios] if name in ratios}
