"""``copy``: pages <-> slots, against one memcpy of the same bytes in the same run.

KV tensors as vLLM has them on a CPU: one tensor, per layer a part of it, blocks of 128 tokens, pages of 98,304
bytes with the default configuration. The blocks of a prompt lie scattered, as in a cache that has been used for
a while, and go to slots of two blocks (a chunk of 256 tokens) in a shared pool, as in a server's.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable

import msgspec
import numpy as np

from kvstrata.bench.report import Report, Target, environment, median
from kvstrata.frame import HEADER_BYTES
from kvstrata.memory.pool import slot_bytes
from kvstrata.memory.region import SharedRegion

_TARGETS = {"store_over_memcpy": Target(at_least=0.5), "retrieve_over_memcpy": Target(at_least=0.5)}


class CopyConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. The default is SmolLM2-135M with a prompt of 3,584 tokens."""

    num_layers: int = 30
    kv_heads: int = 3
    head_size: int = 64
    block_size: int = 128
    num_blocks: int = 28
    """Blocks of the prompt."""
    blocks_per_chunk: int = 2
    engine_blocks: int = 256
    """Blocks of the engine, among which those of the prompt are scattered."""
    runs: int = 15

    @property
    def page_bytes(self) -> int:
        """Bytes of one block of one layer: keys and values in bf16."""
        return self.kv_heads * self.block_size * 2 * self.head_size * 2


class Rates(msgspec.Struct, frozen=True):
    """Bytes per second of every run."""

    memcpy: list[float]
    store: list[float]
    retrieve: list[float]


def run(config: CopyConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure. Needs torch, and memory for the engine's blocks and three times the prompt's.

    Raises:
        LayoutError, PoolError: the tensors cannot be copied, or there is too little memory.
    """
    machine = environment()
    progress("copying")
    rates = _measure(config)
    memcpy, store, retrieve = (median(values) for values in (rates.memcpy, rates.store, rates.retrieve))
    return Report(
        benchmark="copy",
        environment=machine,
        config=msgspec.to_builtins(config) | {"page_bytes": config.page_bytes},
        method=(
            f"{config.runs} runs, in each of which store, memcpy and retrieve take turns, after two runs of "
            "warm-up (all memory touched). Ratios are the medians of each run's own ratio."
        ),
        columns=("what", "GB/s", "ms"),
        rows=tuple(
            (name, rate / 1e9, _total_bytes(config) / rate * 1000)
            for name, rate in (("memcpy", memcpy), ("store", store), ("retrieve", retrieve))
        ),
        ratios={
            "store_over_memcpy": median([s / m for s, m in zip(rates.store, rates.memcpy, strict=True)]),
            "retrieve_over_memcpy": median(
                [r / m for r, m in zip(rates.retrieve, rates.memcpy, strict=True)]
            ),
        },
        targets=_TARGETS,
        samples=msgspec.to_builtins(rates),
    )


def _total_bytes(config: CopyConfig) -> int:
    return config.num_layers * config.num_blocks * config.page_bytes


def _measure(config: CopyConfig) -> Rates:
    # Here, because torch takes seconds to import and no other benchmark needs it.
    import torch  # noqa: PLC0415

    from kvstrata.device.copy import make_copier  # noqa: PLC0415
    from kvstrata.device.layout import find_pages  # noqa: PLC0415

    shape = (
        config.num_layers,
        config.engine_blocks,
        config.kv_heads,
        config.block_size,
        2 * config.head_size,
    )
    cache = torch.ones(shape, dtype=torch.bfloat16)
    tensors = {f"layer{i}": cache[i] for i in range(config.num_layers)}
    pages = find_pages(tensors, num_blocks=config.engine_blocks, block_size=config.block_size, kernel="bench")
    copier = make_copier(pages)
    blocks = random.Random(0).sample(range(config.engine_blocks), config.num_blocks)  # noqa: S311
    chunks = [blocks[i : i + config.blocks_per_chunk] for i in range(0, len(blocks), config.blocks_per_chunk)]
    slot = slot_bytes(HEADER_BYTES + config.blocks_per_chunk * pages.layout.block_bytes)
    region = SharedRegion.create(slot * len(chunks))
    try:
        region.view[:] = bytes(len(region.view))
        payloads = [
            region.view[at : at + len(ids) * pages.layout.block_bytes]
            for at, ids in zip(range(HEADER_BYTES, len(region.view), slot), chunks, strict=True)
        ]

        def store() -> None:
            for ids, payload in zip(chunks, payloads, strict=True):
                copier.store(ids, payload)

        def retrieve() -> None:
            for ids, payload in zip(chunks, payloads, strict=True):
                copier.load(payload, 0, ids)

        memcpy = _memcpy(_total_bytes(config))
        calls = {"store": store, "memcpy": memcpy, "retrieve": retrieve}
        return _rates(calls, _total_bytes(config), config.runs)
    finally:
        for payload in payloads:
            payload.release()
        region.close()


def _memcpy(num_bytes: int) -> Callable[[], None]:
    """One memcpy of that many bytes between two pieces of memory that have been touched."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)

    def copy() -> None:
        ctypes.memmove(target.ctypes.data, source.ctypes.data, num_bytes)

    return copy


def _rates(calls: dict[str, Callable[[], None]], num_bytes: int, runs: int) -> Rates:
    """Bytes per second of each call, in turn, so that whatever drifts drifts for all."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            rates[name].append(num_bytes / (time.perf_counter() - start))
    return Rates(**{name: values[2:] for name, values in rates.items()})
