"""Entries that were corrupted, truncated or swapped in Redis and on disk are misses, never wrong answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from vllm_engine import Engine, assert_equal_answers

from kvstrata.testing.redis_server import RedisServer

PROMPT_TOKENS = 500
ARGS = ["--block-size", "32", "--max-model-len", "1024"]


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]


def _truncate(data: bytes) -> bytes:
    return data[: len(data) - 1000]


def _damage_files(root: Path, damage: Callable[[bytes], bytes]) -> int:
    files = [path for path in root.rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    for path in files:
        path.write_bytes(damage(path.read_bytes()))
    return len(files)


def _damage_redis(client: redis.Redis, damage: Callable[[bytes], bytes]) -> int:
    keys = list(client.scan_iter("*kv_bytes"))
    for key in keys:
        value = client.get(key)
        assert isinstance(value, bytes)
        client.set(key, damage(value))
    return len(keys)


def _swap_redis(client: redis.Redis) -> int:
    keys = sorted(client.scan_iter("*kv_bytes"))
    values = [client.get(key) for key in keys]
    for key, value in zip(keys, values[1:] + values[:1], strict=True):
        assert isinstance(value, bytes)
        client.set(key, value)
    return len(keys)


@pytest.mark.parametrize("tier", ["redis", "disk"])
def test_damaged_entries_never_reach_an_answer(
    tier: str, model: Path, corpus: list[int], redis_server: RedisServer, tmp_path: Path
) -> None:
    """L1 only passes through, so that every request reads the tier."""
    disk = tmp_path / "disk"
    where = {"remote_url": redis_server.url} if tier == "redis" else {"local_disk": str(disk)}
    extra = {"chunk_size": 128, "local_cpu": False, "gate": "always", **where}
    client = redis.Redis.from_url(redis_server.url)
    client.flushall()
    with Engine(model, tmp_path / "engine.log", extra=extra, args=ARGS) as engine:
        damages: list[Callable[[], int]]
        if tier == "redis":
            damages = [
                lambda: _damage_redis(client, _flip),
                lambda: _damage_redis(client, _truncate),
                lambda: _swap_redis(client),
                lambda: _damage_redis(client, lambda data: b"not a frame"),
            ]
        else:
            damages = [lambda: _damage_files(disk, _flip), lambda: _damage_files(disk, _truncate)]
        prompt = corpus[3000 : 3000 + PROMPT_TOKENS]
        expected = engine.complete(prompt, max_tokens=8, ignore_eos=True)
        _settle(engine)
        before = engine.hit_tokens()[tier]
        assert_equal_answers(expected, engine.complete(prompt, max_tokens=8, ignore_eos=True))
        assert engine.hit_tokens()[tier] - before == PROMPT_TOKENS
        for damage in damages:
            assert damage() > 1
            misses = _corrupt_misses(engine, tier)
            assert_equal_answers(expected, engine.complete(prompt, max_tokens=8, ignore_eos=True))
            assert _corrupt_misses(engine, tier) > misses
            _settle(engine)
    client.close()


def _corrupt_misses(engine: Engine, tier: str) -> int:
    misses: dict[str, int] = engine.stats()["totals"]["tier_frame_misses"][tier]
    return misses["corrupt"]


def _settle(engine: Engine) -> None:
    """Wait until background writes have ended."""
    import time  # noqa: PLC0415

    deadline = time.monotonic() + 30
    while any(tier["queued_bytes"] for tier in engine.stats()["tiers"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.sync()
