"""``codec``: how much smaller, how fast, and up to which link speed it pays, on the KV of a real model.

Every codec encodes and decodes whole chunks as the I/O threads do. With two threads each has chunks of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kvstrata.bench.codecs import LEVELS, chosen, key_file
from kvstrata.bench.kv import CHUNK_TOKENS, RealKV, real_kv
from kvstrata.bench.report import Report, Target, environment, median
from kvstrata.codecs.base import Codec, PayloadDescription
from kvstrata.errors import ConfigError

_TARGETS = {
    "lossless_size": Target(at_least=1.4),
    "lossless_decode_gb_per_second": Target(at_least=0.5),
    "fp8_size": Target(at_least=1.999),  # the scales of the heads take the rest
    "fp8_decode_gb_per_second": Target(at_least=1.0),
    "int4_size": Target(at_least=3.5),
    "int4_decode_gb_per_second": Target(at_least=0.7),
    "cachegen_size": Target(at_least=4.5),
    "cachegen_decode_gb_per_second": Target(at_least=0.15),
    "cachegen:high_size": Target(at_least=3),
    "cachegen:high_decode_gb_per_second": Target(at_least=0.15),
}
THREADS = (1, 2)
_COLUMNS = (
    "codec",
    "smaller",
    "exact",
    "encode GB/s",
    "decode GB/s",
    "2 threads",
    "GB per CPU s",
    "break-even MB/s",
)


class CodecBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    codecs: tuple[str, ...] = ()
    """Spellings; by default all that are installed, other levels, and encryption of the best lossless one."""
    chunks: int = 4
    """Passages of 256 tokens."""
    cache_dir: str = ".cache"
    """Where the model is, or is made once."""
    runs: int = 7


class Measured(msgspec.Struct):
    """One codec: bytes, and raw bytes per second of every run, by operation and number of threads."""

    lossless: bool
    exact: bool
    """Whether every payload came back to the byte."""
    size: float
    """Raw bytes over encoded bytes."""
    rates: dict[str, list[float]] = {}

    def rate(self, operation: str, threads: int) -> float:
        """GB/s of raw KV, the median."""
        return median(self.rates[f"{operation} {threads}"]) / 1e9

    @property
    def break_even(self) -> float | None:
        """GB/s of a link on which loading takes as long as without the codec; on a faster one it costs time.

        One after the other, reading takes 1/(size*link) per raw byte and decoding 1/rate, without the codec 1/link.
        """
        return self.rate("decode", 2) * (1 - 1 / self.size) if self.size > 1 else None


def run(
    config: CodecBenchConfig, progress: Callable[[str], None] = lambda _: None, kv: RealKV | None = None
) -> Report:
    """Measure; on ``kv`` if given, else on what the small model makes.

    Raises:
        ConfigError: a codec cannot be had, or there is no model to make KV with.
    """
    machine = environment()
    measured: dict[str, Measured] = {}
    notes: list[str] = []
    with key_file() as path:
        codecs = chosen(config.codecs, (*LEVELS, "floats+aesgcm"), {"key_file": str(path)}, notes)
    if kv is None:
        progress(f"computing the KV of {config.chunks} passages")
        kv = real_kv(Path(config.cache_dir), config.chunks)
    if len(kv.payloads) < max(THREADS):
        raise ConfigError(f"{max(THREADS)} threads need as many chunks")
    for spelling, codec in codecs.items():
        progress(spelling)
        measured[spelling] = _measure(codec, kv, config.runs)
    return Report(
        benchmark="codec",
        environment=machine,
        config=msgspec.to_builtins(config) | {"payload_bytes": len(kv.payloads[0])},
        method=(
            f"KV in bf16 of SmolLM2-135M for {len(kv.payloads)} passages of natural text of {CHUNK_TOKENS} tokens. "
            f"{config.runs} runs after one of warm-up. GB/s are raw bytes over time, on one thread unless said, "
            "medians; those per second of CPU time hold on a busy machine too. The break-even is the speed of a "
            "link above which loading takes longer with the codec than without; decoding after reading, 2 threads."
        ),
        columns=_COLUMNS,
        rows=tuple(_row(name, each) for name, each in measured.items()),
        ratios=_ratios(measured),
        targets=_TARGETS,
        notes=tuple(notes),
        samples={
            f"{name} {key}": rates for name, each in measured.items() for key, rates in each.rates.items()
        },
    )


def _row(name: str, each: Measured) -> tuple[str | float | int | None, ...]:
    exact = "yes" if each.exact else "NO" if each.lossless else "lossy"
    speeds = [each.rate(*of) for of in (("encode", 1), ("decode", 1), ("decode", 2), ("decode CPU", 1))]
    return (name, each.size, exact, *speeds, each.break_even and each.break_even * 1000)


def _ratios(measured: dict[str, Measured]) -> dict[str, float]:
    ratios = {f"{name}_size": each.size for name, each in measured.items()}
    ratios |= {f"{name}_decode_gb_per_second": each.rate("decode", 2) for name, each in measured.items()}
    exact = [each for each in measured.values() if each.lossless and each.exact]
    if exact:
        best = max(exact, key=lambda each: each.size)
        ratios["lossless_size"] = best.size
        ratios["lossless_decode_gb_per_second"] = best.rate("decode", 2)
        ratios["lossless_decode_gb_per_cpu_second"] = best.rate("decode CPU", 1)
    return ratios


def _measure(codec: Codec, kv: RealKV, runs: int) -> Measured:
    what = PayloadDescription(
        layout=kv.layout,
        num_tokens=CHUNK_TOKENS,
        payload_bytes=len(kv.payloads[0]),
        dtype=kv.layout.dtype,
        codec=codec.name,
        codec_parameters=codec.parameters,
    )
    payloads = [memoryview(payload) for payload in kv.payloads]
    room = [memoryview(bytearray(codec.max_encoded_bytes(what))) for _ in payloads]
    decoded = [memoryview(bytearray(what.payload_bytes)) for _ in payloads]
    encoded = [b[: codec.encode(p, what, b)] for p, b in zip(payloads, room, strict=True)]

    def encode(index: int) -> None:
        encoded[index] = room[index][: codec.encode(payloads[index], what, room[index])]

    def decode(index: int) -> None:
        codec.decode(encoded[index], what, codec.parameters, decoded[index])

    num_bytes = what.payload_bytes * len(payloads)
    rates: dict[str, list[float]] = {}
    for round_number in range(runs + 1):
        for operation, call in (("encode", encode), ("decode", decode)):
            for threads in THREADS:
                seconds, cpu_seconds = _timed(call, len(payloads), threads)
                if round_number:
                    rates.setdefault(f"{operation} {threads}", []).append(num_bytes / seconds)
                    rates.setdefault(f"{operation} CPU {threads}", []).append(num_bytes / cpu_seconds)
    return Measured(
        lossless=codec.lossless,
        exact=all(a == b for a, b in zip(payloads, decoded, strict=True)),
        size=num_bytes / sum(map(len, encoded)),
        rates=rates,
    )


def _timed(call: Callable[[int], None], count: int, num_threads: int) -> tuple[float, float]:
    """Seconds and CPU seconds for ``call(0) .. call(count - 1)``, shared among threads."""

    def work(indices: Sequence[int]) -> None:
        for index in indices:
            call(index)

    shares = [range(first, count, num_threads) for first in range(num_threads)]
    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    start, cpu_start = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, time.process_time() - cpu_start
