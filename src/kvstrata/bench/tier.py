"""``tier URL``: a tier's read, write and contains, against a raw loop of the same transport in the same run.

The tier is used as the core uses it: writes of one frame, reads of as many as make a batch. The raw loop
(:mod:`kvstrata.testing.raw`) moves the same number of bytes with the fewest operations that the transport allows.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import msgspec

from kvstrata.bench.report import Environment, Report, Target, environment, median
from kvstrata.cache.io import BATCH_BYTES
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.config import DIRECTORY_SCHEMES, mask, tier_from_url
from kvstrata.errors import ConfigError, TierError
from kvstrata.frame import HEADER_BYTES, FrameHeader, payload_checksum
from kvstrata.testing.raw import raw_loop
from kvstrata.tiers.base import Tier
from kvstrata.tiers.open import open_tier
from kvstrata.tiers.redis.url import SCHEMES
from kvstrata.types import HASH_BYTES, KVLayout, Miss, Namespace

_TARGETS = {"read_over_raw": Target(at_least=0.8), "write_over_raw": Target(at_least=0.8)}
_RAW_SCHEMES = frozenset({*SCHEMES, "unix", *DIRECTORY_SCHEMES, "s3", "mooncakestore", "infinistore"})
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_BLOCK_BYTES = 30 * 98_304


class TierBenchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. Frames are those of chunks of 256 tokens of SmolLM2-135M by default."""

    url: str
    frame_bytes: int = HEADER_BYTES + 2 * _BLOCK_BYTES
    num_frames: int = 8
    """Frames per round."""
    contains_keys: int = 256
    """Keys of one look-up."""
    runs: int = 7


class Samples(msgspec.Struct, frozen=True):
    """Bytes per second of every round; milliseconds of every contains."""

    write: list[float] = []
    read: list[float] = []
    raw_write: list[float] = []
    raw_read: list[float] = []
    contains_ms: list[float] = []


def run(config: TierBenchConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure. What was written is deleted; a directory gets a directory of its own meanwhile.

    Raises:
        ConfigError: there is no tier for such a URL.
        TierError: it failed.
        OSError: the raw loop failed.
    """
    machine = environment()
    with _own_place(config.url) as url:
        tier = open_tier(tier_from_url(url))
        try:
            samples = _measure(config, tier, url, progress)
        finally:
            tier.close()
    return _report(config, machine, samples)


def _report(config: TierBenchConfig, machine: Environment, samples: Samples) -> Report:
    rows: list[tuple[str | float | int | None, ...]] = []
    ratios: dict[str, float] = {}
    for name, ours, raw in (
        ("read", samples.read, samples.raw_read),
        ("write", samples.write, samples.raw_write),
    ):
        raw_rate = median(raw) / 1e6 if raw else None
        rows.append((name, median(ours) / 1e6, raw_rate, None))
        if raw:
            ratios[f"{name}_over_raw"] = median([a / b for a, b in zip(ours, raw, strict=True)])
    rows.append((f"contains, {config.contains_keys} keys", None, None, median(samples.contains_ms)))
    notes = () if samples.raw_read else ("There is no raw loop for this kind of URL, hence no ratios.",)
    return Report(
        benchmark="tier",
        environment=machine,
        config=msgspec.to_builtins(config) | {"url": mask(config.url)},
        method=(
            f"{config.runs} rounds of {config.num_frames} frames, in each of which the raw loop and the tier take "
            "turns, on one thread with one connection to each server, after one round of warm-up. Ratios are the "
            "medians of each round's own ratio."
        ),
        columns=("what", "MB/s", "raw loop MB/s", "ms"),
        rows=tuple(rows),
        ratios=ratios,
        targets=_TARGETS,
        notes=notes,
        samples=msgspec.to_builtins(samples),
    )


@contextlib.contextmanager
def _own_place(url: str) -> Iterator[str]:
    """``url``, or for a directory a new one in it: what is there is none of our business."""
    parts = urlsplit(url)
    if parts.scheme not in DIRECTORY_SCHEMES:
        yield url
        return
    parent = Path(unquote(parts.path))
    if not parent.is_dir():
        raise ConfigError(f"there is no directory {parent}")
    with tempfile.TemporaryDirectory(prefix="kvstrata-bench-", dir=parent) as directory:
        yield f"{parts.scheme}://{quote(directory)}"


def _measure(config: TierBenchConfig, tier: Tier, url: str, progress: Callable[[str], None]) -> Samples:
    samples = Samples()
    keys, frames = _make_frames(config)
    buffers = [memoryview(bytearray(config.frame_bytes)) for _ in frames]
    for buffer in buffers:
        buffer[:] = bytes(config.frame_bytes)
    has_raw_loop = _has_raw_loop(url)
    try:
        for number in range(config.runs + 1):
            progress(f"round {number} of {config.runs}" if number else "warm-up")
            into = samples if number else Samples()
            if has_raw_loop:
                _raw_round(config, url, into)
            _round(config, tier, keys, frames, buffers, into)
    finally:
        tier.delete(keys)
    return samples


def _has_raw_loop(url: str) -> bool:
    parts = urlsplit(url)
    if (
        parts.scheme == "lm"
    ):  # what it is compared with is a bare server here: of no use for a server elsewhere
        return parts.hostname in _LOOPBACK
    return parts.scheme in _RAW_SCHEMES


def _raw_round(config: TierBenchConfig, url: str, into: Samples) -> None:
    address = url
    if urlsplit(url).scheme in DIRECTORY_SCHEMES:
        directory = Path(unquote(urlsplit(url).path)) / "raw"
        directory.mkdir(exist_ok=True)
        address = f"file://{quote(str(directory))}"
    rates = raw_loop(address, frame_bytes=config.frame_bytes, num_frames=config.num_frames, num_rounds=1)
    into.raw_write.extend(rates.write)
    into.raw_read.extend(rates.read)


def _round(
    config: TierBenchConfig,
    tier: Tier,
    keys: list[str],
    frames: list[memoryview],
    buffers: list[memoryview],
    into: Samples,
) -> None:
    num_bytes = config.frame_bytes * len(keys)
    start = time.perf_counter()
    for key, frame in zip(keys, frames, strict=True):
        tier.write([key], [frame])
    into.write.append(num_bytes / (time.perf_counter() - start))

    per_batch = max(1, BATCH_BYTES // config.frame_bytes)
    results: list[int | Miss] = []
    start = time.perf_counter()
    for first in range(0, len(keys), per_batch):
        results += tier.read(keys[first : first + per_batch], buffers[first : first + per_batch])
    into.read.append(num_bytes / (time.perf_counter() - start))
    if results != [config.frame_bytes] * len(keys) or buffers != frames:
        raise TierError("the tier did not return what was written; does it have room for it?")

    asked = (keys * config.contains_keys)[: config.contains_keys]
    start = time.perf_counter()
    held = tier.contains(asked)
    into.contains_ms.append((time.perf_counter() - start) * 1000)
    if not all(held):
        raise TierError("the tier lost what was written; does it have room for it?")


def _make_frames(config: TierBenchConfig) -> tuple[list[str], list[memoryview]]:
    """Whole frames of random bytes, and keys for them that nobody else has."""
    payload_bytes = config.frame_bytes - HEADER_BYTES
    layout = KVLayout(block_size=1, page_bytes=(payload_bytes,), dtype="uint8", kernel_format="bench")
    namespace = Namespace("kvstrata", "bench", "", "auto", 1, "tp1pp1", 1, layout)
    keys, frames = [], []
    for _ in range(config.num_frames):
        chunk_hash = os.urandom(HASH_BYTES)
        frame = memoryview(bytearray(HEADER_BYTES) + bytearray(os.urandom(payload_bytes)))
        FrameHeader(
            shard=0,
            first_token=0,
            num_tokens=1,
            block_size=1,
            payload_bytes=payload_bytes,
            encoded_bytes=payload_bytes,
            layout_fingerprint=layout.fingerprint,
            chunk_hash=chunk_hash,
            tokens_hash=b"",
            payload_checksum=payload_checksum(frame[HEADER_BYTES:]),
            created_at=int(time.time()),
            codec=NaiveCodec.name,
            dtype=layout.dtype,
        ).pack_into(frame)
        keys.append(namespace.key(chunk_hash, 0))
        frames.append(frame)
    return keys, frames
