"""``lookup``: how long a look-up takes through the socket, and what the index costs, against its size.

A real server runs as a process of its own: ``kvstrata server`` on TCP, and the private server of embedded mode on
a unix socket. Its index is filled by a client, with reservations and commits as a worker makes them; payloads are
tiny, as only the index matters here. What is timed is what the connector does for a new request: hash the
prompt's tokens with a fresh hasher, ask the server, decode the answer.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvstrata.bench.observed import measure as measure_added
from kvstrata.bench.report import Report, Target, environment
from kvstrata.client import RemoteClient, connect
from kvstrata.config import Settings
from kvstrata.errors import ConfigError, ServerUnavailable
from kvstrata.hashing import PrefixHasher, full_chunks
from kvstrata.memory.pool import SLOT_ALIGNMENT_BYTES
from kvstrata.testing.guard import descendants
from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.types import HASH_BYTES, KVLayout, Namespace, Piece

Transport = Literal["ipc", "tcp"]

_BATCH_CHUNKS = 1000
_NUM_PROMPTS = 10
_TIMEOUT_SECONDS = 60.0
_TARGETS = {
    "p50_ms": Target(at_most=5.0),
    "bytes_per_chunk": Target(at_most=600.0),
    "hit_with_metrics_over_without": Target(at_most=1.05),
    "miss_with_metrics_over_without": Target(at_most=1.05),
}


class LookupConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    chunks: int = 1_000_000
    """Size of the index in the end; it is measured at the powers of ten on the way, too."""
    prompt_tokens: int = 32_000
    block_size: int = 16
    chunk_size: int = 256
    transports: tuple[Transport, ...] = ("ipc", "tcp")
    lookups: int = 200
    """Look-ups per run."""
    runs: int = 5


class Sizes(msgspec.Struct, frozen=True):
    """What was measured at one size of the index, over one transport. Times in milliseconds."""

    transport: str
    chunks: int
    hit_p50: float
    hit_p99: float
    miss_p50: float
    hash_p50: float
    """The part of a hit that is hashing, in this process."""
    bytes_per_chunk: float
    seconds_to_fill: float


def run(config: LookupConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure. The server's pool takes ``chunks`` times 4 KiB of memory meanwhile.

    Raises:
        ConfigError: the index is to be smaller than what is looked up.
        KVStrataError: the server cannot be started.
    """
    min_chunks = config.prompt_tokens // config.chunk_size * _NUM_PROMPTS
    if not 0 < min_chunks <= config.chunks:
        raise ConfigError(f"{config.chunks} chunks; the prompts that are looked up have {min_chunks}")
    machine = environment()
    measured = [
        sizes for transport in config.transports for sizes in _measure_transport(config, transport, progress)
    ]
    last = [sizes for sizes in measured if sizes.chunks == config.chunks]
    progress("what metrics and explanations add")
    added = measure_added(
        make_namespace(config), _random_prompt(config, _NUM_PROMPTS), config.lookups * config.runs
    )
    fastest_hit, fastest_miss = min(s.hit_p50 for s in last), min(s.miss_p50 for s in last)
    return Report(
        benchmark="lookup",
        environment=machine,
        config=msgspec.to_builtins(config),
        method=(
            f"{config.runs} runs of {config.lookups} look-ups of {_NUM_PROMPTS} prompts in turn, after one run of "
            "warm-up; hashing included; figures are medians over the runs. bytes_per_chunk: growth of the "
            "server's private memory since its start. Of several transports the ratios are the worst. "
            "with_metrics_over_without: the look-up through the socket over the same less what metrics and "
            "explanations add in the core, which is measured in this process, next to a core without them."
        ),
        columns=(
            "transport",
            "chunks",
            "hit p50 ms",
            "hit p99 ms",
            "miss p50 ms",
            "hashing ms",
            "bytes/chunk",
            "fill s",
        ),
        rows=tuple(msgspec.structs.astuple(sizes) for sizes in measured),
        ratios={
            "p50_ms": max(sizes.hit_p50 for sizes in last),
            "p99_ms": max(sizes.hit_p99 for sizes in last),
            "bytes_per_chunk": max(sizes.bytes_per_chunk for sizes in last),
            "hit_with_metrics_over_without": fastest_hit / (fastest_hit - added.hit),
            "miss_with_metrics_over_without": fastest_miss / (fastest_miss - added.miss),
        },
        targets=_TARGETS,
        notes=(
            f"metrics and explanations add {added.hit * 1e3:.1f} us to a hit, {added.miss * 1e3:.1f} us to a miss",
        ),
    )


def make_namespace(config: LookupConfig) -> Namespace:
    """A namespace whose frames take one unit of allocation each."""
    layout = KVLayout(config.block_size, page_bytes=(32, 32), dtype="uint8", kernel_format="bench")
    return Namespace("bench", "bench", "", "auto", 1, "tp1pp1", config.chunk_size, layout)


def _measure_transport(
    config: LookupConfig, transport: Transport, progress: Callable[[str], None]
) -> Iterator[Sizes]:
    namespace = make_namespace(config)
    progress(f"{transport}: starting a server")
    with _server(config, transport) as (client, pid):
        before_bytes = private_bytes(pid)
        prompts = [_random_prompt(config, seed) for seed in range(_NUM_PROMPTS)]
        for prompt in prompts:
            _store(client, namespace, prompt)
        held, seconds = config.prompt_tokens // config.chunk_size * _NUM_PROMPTS, 0.0
        for size in _steps(held, config.chunks):
            progress(f"{transport}: filling the index to {size:,} chunks")
            start = time.perf_counter()
            _fill(client, namespace, size - held)
            seconds += time.perf_counter() - start
            held = size
            growth = private_bytes(pid) - before_bytes
            progress(f"{transport}: looking up in {size:,} chunks")
            hits = _timed_runs(config, lambda i: _look_up(client, namespace, prompts[i], hits=True))
            misses = _timed_runs(config, lambda i: _look_up(client, namespace, prompts[i][1:], hits=False))
            hashing = _timed_runs(config, lambda i: _hash(namespace, prompts[i]))
            yield Sizes(
                transport=transport,
                chunks=size,
                hit_p50=_percentile(hits, 50),
                hit_p99=_percentile(hits, 99),
                miss_p50=_percentile(misses, 50),
                hash_p50=_percentile(hashing, 50),
                bytes_per_chunk=growth / size,
                seconds_to_fill=seconds,
            )


def _steps(first: int, last: int) -> list[int]:
    """The powers of ten from ``first`` to ``last``, then ``last`` itself."""
    powers = [10**n for n in range(4, 12)]
    return [power for power in powers if first < power < last] + [last]


@contextlib.contextmanager
def _server(config: LookupConfig, transport: Transport) -> Iterator[tuple[RemoteClient, int]]:
    """A server with room for the index, a client of it, and its process id."""
    pool_bytes = (config.chunks + 10_000) * SLOT_ALIGNMENT_BYTES
    with tempfile.TemporaryDirectory(prefix="kvstrata-bench-") as directory, contextlib.ExitStack() as stack:
        settings = Settings(
            max_local_cpu_size=pool_bytes / 2**30,
            runtime_dir=directory,
            rpc_timeout_ms=int(_TIMEOUT_SECONDS * 1000),
            log_level="WARNING",
        )
        if transport == "tcp":
            port = free_port()
            server = stack.enter_context(_server_process(settings, Path(directory), port))
            settings = msgspec.structs.replace(settings, server_url=f"tcp://127.0.0.1:{port}")
        client = stack.enter_context(connect(settings, name="bench"))
        if not client.wait_connected(_TIMEOUT_SECONDS):
            raise ServerUnavailable("the benchmark's server does not answer")
        yield client, server.pid if transport == "tcp" else _embedded_pid()


def _server_process(settings: Settings, directory: Path, port: int) -> ServerProcess:
    command = [sys.executable, "-m", "kvstrata.cli", "server", "--port", str(port)]
    command += ["--http-port", str(free_port()), "--l1-size-gb", str(settings.max_local_cpu_size)]
    command += ["--set", f"runtime_dir={directory}", "--log-level", settings.log_level]
    env = {name: None for name in os.environ if name.startswith(("KVSTRATA_", "LMCACHE_"))}
    return ServerProcess("kvstrata server", command, log_path=directory / "server.log", env=env)


def _embedded_pid() -> int:
    for pid in descendants(os.getpid()):
        if b"kvstrata.server.embedded" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise ServerUnavailable("the embedded server has ended")


def private_bytes(pid: int) -> int:
    """Memory of a process that is its own: without the pool, which is shared, and without files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ServerUnavailable(f"process {pid} has no memory (it has ended)")


def _random_prompt(config: LookupConfig, seed: int) -> list[int]:
    source = random.Random(seed)  # noqa: S311  (no secrets)
    return [source.randrange(128_000) for _ in range(config.prompt_tokens)]


def _store(client: RemoteClient, namespace: Namespace, tokens: list[int]) -> None:
    hasher = PrefixHasher(namespace)
    hasher.extend(tokens)
    pieces = full_chunks(hasher, namespace.chunk_size, 0, len(tokens) // namespace.chunk_size)
    client.commit(client.reserve(namespace, 0, pieces))


def _fill(client: RemoteClient, namespace: Namespace, num_chunks: int) -> None:
    """Store chunks that no prompt has: chains as long as a prompt's, of random hashes."""
    per_chain = 125
    left = num_chunks
    while left > 0:
        pieces: list[Piece] = []
        for position in range(min(left, _BATCH_CHUNKS)):
            place = position % per_chain
            parent = pieces[-1].chunk_hash if place else os.urandom(HASH_BYTES)
            pieces.append(
                Piece(os.urandom(HASH_BYTES), parent, place * namespace.chunk_size, namespace.chunk_size)
            )
        client.commit(client.reserve(namespace, 0, pieces))
        left -= len(pieces)
    held = client.stats().get("l1", {}).get("entries")
    if held is None:
        raise ServerUnavailable("the benchmark's server does not answer any more")


def _hash(namespace: Namespace, tokens: list[int]) -> Any:
    hasher = PrefixHasher(namespace)
    hasher.extend(tokens)
    return hasher.prefix(tokens)


def _look_up(client: RemoteClient, namespace: Namespace, tokens: list[int], *, hits: bool) -> None:
    hit = client.lookup("bench", namespace, _hash(namespace, tokens))
    if hits != (hit.num_tokens > 0):
        raise ServerUnavailable(f"a look-up found {hit.num_tokens} of {len(tokens)} tokens")
    client.release("bench")


def _timed_runs(config: LookupConfig, call: Callable[[int], None]) -> list[list[float]]:
    """Milliseconds of every call, by run."""
    runs = []
    for number in range(config.runs + 1):
        gc.collect()
        times = []
        for i in range(config.lookups):
            start = time.perf_counter()
            call(i % _NUM_PROMPTS)
            times.append((time.perf_counter() - start) * 1000)
        if number:
            runs.append(times)
    return runs


def _percentile(runs: list[list[float]], percent: int) -> float:
    """The median over the runs of each run's percentile."""
    return statistics.median(statistics.quantiles(times, n=100)[percent - 1] for times in runs)
