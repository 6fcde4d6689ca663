"""``faults``: what a far L2 costs a look-up, and what one that does not answer costs.

Cores in this process with a Redis or Valkey of their own as L2: behind the TCP proxy of the test kit
(:mod:`kvstrata.testing.proxy`), which adds the latency, and one that is stopped (SIGSTOP), so that it accepts
connections and never answers. Payloads are tiny, as only round trips and deadlines matter here.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from kvstrata.bench.report import Report, Target, environment, median
from kvstrata.client import LocalClient
from kvstrata.config import Settings
from kvstrata.hashing import PrefixHasher, full_chunks
from kvstrata.testing.proxy import far_away
from kvstrata.testing.redis_server import RedisServer
from kvstrata.types import Hit, KVLayout, Namespace, Prefix

_LAYOUT = KVLayout(block_size=16, page_bytes=(32, 32), dtype="uint8", kernel_format="bench")
_NAMESPACE = Namespace("bench", "bench", "", "auto", 1, "tp1pp1", 256, _LAYOUT)
_POOL_GIB = 0.03
_PATIENCE_SECONDS = 60.0
_TARGETS = {
    "lookup_ms": Target(at_most=12.0),
    "stalled_over_deadline": Target(at_most=1.1),
    "open_over_none": Target(at_most=1.03),
}


class FaultsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    round_trip_ms: float = 5.0
    chunks: int = 128
    """Of 256 tokens, in blocks of 16."""
    lookup_timeout_ms: int = 500
    runs: int = 30


class Samples(msgspec.Struct, frozen=True):
    """Milliseconds of every look-up."""

    absent: list[float] = []
    held: list[float] = []
    stalled: list[float] = []
    breaker_open: list[float] = []
    no_l2: list[float] = []


def run(config: FaultsConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure.

    Raises:
        RuntimeError: there is no server program, or what must come about does not.
    """
    machine = environment()
    samples = Samples()
    prompts = _prompts(config.chunks)
    with RedisServer(["maxmemory 256mb", "maxmemory-policy allkeys-lru"]) as server:
        progress("a far L2")
        with far_away(server.port, config.round_trip_ms / 1000) as port, _core(config, port) as client:
            _measure_far(client, config, prompts, samples)
        with _core(config, server.port) as client, _core(config) as without:
            progress("an L2 that does not answer")
            for _ in range(3):
                _measure_stall(client, server, prompts, samples)
            progress("its breaker open, next to no L2")
            server.suspend()
            _open_breaker(client, prompts)
            for number in range(20 * config.runs):
                prompt = next(prompts)
                pair = [(client, samples.breaker_open), (without, samples.no_l2)]
                for one, into in pair if number % 2 else reversed(pair):
                    into.append(_timed(one, prompt)[1])
            server.resume()
    return _report(config, machine, samples)


def _report(config: FaultsConfig, machine: Any, samples: Samples) -> Report:
    rows = [
        (f"nothing held, {config.round_trip_ms:g} ms round trip", samples.absent),
        ("all held, read to L1", samples.held),
        (f"does not answer, deadline {config.lookup_timeout_ms} ms", samples.stalled),
        ("breaker open", samples.breaker_open),
        ("no L2 configured", samples.no_l2),
    ]
    return Report(
        benchmark="faults",
        environment=machine,
        config=msgspec.to_builtins(config),
        method=(
            f"Look-ups of {config.chunks} chunks that L1 lacks, each of another prompt, hashing left out, asked "
            f"again every 0.5 ms until answered: {config.runs} with a far L2, after 3 of warm-up; 3 with one that "
            f"does not answer; {20 * config.runs} with its breaker open, in turn with as many without an L2."
        ),
        columns=("look-up", "median ms", "longest ms"),
        rows=tuple((name, median(values), max(values)) for name, values in rows),
        ratios={
            "lookup_ms": median(samples.absent),
            "lookup_and_load_ms": median(samples.held),
            "stalled_over_deadline": max(samples.stalled) / config.lookup_timeout_ms,
            "open_over_none": median(samples.breaker_open) / median(samples.no_l2),
        },
        targets=_TARGETS,
        samples=msgspec.to_builtins(samples),
    )


def _core(config: FaultsConfig, l2_port: int | None = None) -> LocalClient:
    """A core, with an L2 or without."""
    settings = Settings(
        max_local_cpu_size=_POOL_GIB,
        gate="always",
        lookup_timeout_ms=config.lookup_timeout_ms,
        # Only the deadline of the look-up itself is to end it.
        blocking_timeout_secs=4 * config.lookup_timeout_ms / 1000,
        breaker_reset_seconds=0.2,
    )
    if l2_port is not None:
        settings = msgspec.structs.replace(settings, remote_url=f"redis://127.0.0.1:{l2_port}")
    return LocalClient(settings)


Prompt = tuple[Prefix, list[Any]]


def _prompts(num_chunks: int) -> Iterator[Prompt]:
    """Prompts that share nothing, with their pieces."""
    for seed in itertools.count():
        rng = random.Random(seed)  # noqa: S311 - test data
        tokens = [rng.randrange(50_000) for _ in range(num_chunks * _NAMESPACE.chunk_size)]
        hasher = PrefixHasher(_NAMESPACE)
        hasher.extend(tokens)
        yield hasher.prefix(tokens), full_chunks(hasher, _NAMESPACE.chunk_size, 0, num_chunks)


def _timed(client: LocalClient, prompt: Prompt) -> tuple[Hit, float]:
    """One look-up, and its milliseconds."""
    started = time.perf_counter()
    hit = client.wait_lookup("bench", _NAMESPACE, prompt[0])
    elapsed = (time.perf_counter() - started) * 1000
    client.release("bench")
    return hit, elapsed


def _measure_far(
    client: LocalClient, config: FaultsConfig, prompts: Iterator[Prompt], samples: Samples
) -> None:
    held = next(prompts)
    _store(client, held)
    for number in range(3 + config.runs):
        client.clear(tiers=False)
        hit, seconds = _timed(client, held)
        if hit.num_tokens != held[0].num_tokens:
            raise RuntimeError(f"{hit.num_tokens} of {held[0].num_tokens} tokens were found again")
        _, absent_seconds = _timed(client, next(prompts))
        if number >= 3:
            samples.held.append(seconds)
            samples.absent.append(absent_seconds)


def _store(client: LocalClient, prompt: Prompt) -> None:
    reservation = client.reserve(_NAMESPACE, 0, prompt[1])
    client.commit(reservation)
    _wait_until(lambda: client.cache.flush(0.1), "what was stored is written to L2")


def _measure_stall(
    client: LocalClient, server: RedisServer, prompts: Iterator[Prompt], samples: Samples
) -> None:
    """The one look-up that meets an L2 which has just stopped to answer; then it answers again."""
    _timed(client, next(prompts))
    _wait_until(lambda: not client.cache.tiers[0].breaker.is_open, "L2 is used")
    server.suspend()
    samples.stalled.append(_timed(client, next(prompts))[1])
    server.resume()
    _wait_until(lambda: not client.cache.tiers[0].breaker.is_open, "L2 is used again")


def _open_breaker(client: LocalClient, prompts: Iterator[Prompt]) -> None:
    _timed(client, next(prompts))
    if not client.cache.tiers[0].breaker.is_open:
        raise RuntimeError("the breaker did not open")


def _wait_until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {_PATIENCE_SECONDS:g} s: {what}")
        time.sleep(0.01)
