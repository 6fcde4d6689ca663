from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from kvstrata.errors import TierUnavailable
from kvstrata.testing.redis_sentinel import RedisSentinel
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import TierContract, make_frame, make_keys, read_frames
from kvstrata.testing.waiting import retried, wait_until
from kvstrata.tiers.base import Tier
from kvstrata.tiers.redis import RedisOptions, RedisTier
from kvstrata.types import Miss


def open_tier(url: str, **options: object) -> RedisTier:
    limits = {"timeout_seconds": 3.0, "connect_timeout_seconds": 3.0}
    return RedisTier(RedisOptions(url=url, **(limits | options)))


@pytest.fixture(scope="module")
def group() -> Iterator[RedisSentinel]:
    with RedisSentinel(password="p@ss/word", sentinel_password="other s3cret") as group:
        yield group


@pytest.fixture
def tier(group: RedisSentinel) -> Iterator[RedisTier]:
    group.master.ask("FLUSHALL")
    with contextlib.closing(open_tier(group.url, timeout_seconds=5)) as tier:
        yield tier


class TestSentinel(TierContract):
    @pytest.fixture
    def tier(self, group: RedisSentinel) -> Iterator[Tier]:
        group.master.ask("FLUSHALL")
        with contextlib.closing(open_tier(group.url, timeout_seconds=5)) as tier:
            yield tier


def commands_of(server: RedisServer, name: str) -> int:
    """How often a server has been given a command."""
    with redis.Redis(port=server.port, password=server.password) as client:
        return int(client.info("commandstats").get(f"cmdstat_{name}", {}).get("calls", 0))


def test_what_was_found_is_said_once_without_secrets(
    group: RedisSentinel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    with contextlib.closing(open_tier(group.url)) as tier:
        for _ in range(3):
            tier.contains(make_keys(2))
        assert "other" not in tier.describe() + repr(tier.options)
    said = [record.getMessage() for record in caplog.records if "the master is" in record.getMessage()]
    assert len(said) == 1
    assert f"127.0.0.1:{group.master.port}" in said[0]
    assert "with 1 replicas" in said[0]
    assert "3 sentinels" in said[0]
    assert "s3cret" not in caplog.text
    assert "p@ss" not in caplog.text


def test_reads_from_the_replica_and_writes_to_the_master(group: RedisSentinel, tier: RedisTier) -> None:
    keys = make_keys(5, seed=5)  # none that a replica may still have from another test
    frames = [make_frame(1000, at) for at in range(5)]
    before = [commands_of(server, "get") for server in (group.master, group.replica)]
    url = f"{group.url}&read_from=replica"
    with contextlib.closing(open_tier(url, ttl_seconds=100, refresh_ttl=True)) as reader:
        reader.write(keys, frames)
        wait_until(lambda: all(reader.contains(keys)), "the replica holds it all")
        assert read_frames(reader, keys, 1000) == [bytes(frame) for frame in frames]
        after = [commands_of(server, "get") for server in (group.master, group.replica)]
        assert [now - then for now, then in zip(after, before, strict=True)] == [0, 5]
        group.replica.suspend()
        try:
            assert reader.contains(keys) != []
        except TierUnavailable:
            pass
        finally:
            assert reader.contains(keys) == [True] * 5
            group.servers[1].resume()
        assert reader.delete(keys) == 5


def test_a_frame_that_a_replica_cannot_give_whole_is_dropped_by_the_master(
    group: RedisSentinel, tier: RedisTier
) -> None:
    (key,) = make_keys(1)
    url = f"{group.url}&read_from=replica"
    with (
        contextlib.closing(open_tier(url, max_value_bytes=4096)) as reader,
        redis.Redis(port=group.master.port, password=group.master.password) as client,
    ):
        reader.write([key], [make_frame(10_000)])
        client.delete(next(client.scan_iter(f"{key}kv_bytes@*")))
        client.wait(1, 5000)
        assert isinstance(read_frames(reader, [key], 10_000)[0], Miss)
        assert client.exists(f"{key}kv_bytes") == 0
        reader.delete([key])
        assert client.dbsize() == 0


def test_the_documented_commands_are_enough(group: RedisSentinel) -> None:
    data = "+ping +select +info +exists +get +getrange +set +hset +expire +unlink +scan +eval +role"
    for server in group.servers:
        server.ask("ACL", "SETUSER", "kvstrata", "on", ">pw", "~*", "-@all", *data.split())
        server.ask("ACL", "LOG", "RESET")
    for sentinel in group.sentinels:
        watch = "+ping +sentinel|get-master-addr-by-name +sentinel|slaves"
        sentinel.ask("ACL", "SETUSER", "watcher", "on", ">look", "-@all", *watch.split())
    hosts = group.url.rpartition("@")[2].partition("?")[0]
    login = "sentinel_username=watcher&sentinel_password=look"
    keys = make_keys(3)
    with contextlib.closing(open_tier(f"redis-sentinel://kvstrata:pw@{hosts}?{login}&db=1")) as tier:
        tier.write(keys, [make_frame(10)] * 3)
        assert tier.contains(keys) == [True] * 3
        assert tier.delete(keys) == 3
    assert group.master.ask("ACL", "LOG") == []


def test_sentinels_that_are_gone_or_hang_are_passed_over(group: RedisSentinel) -> None:
    keys = make_keys(2)
    first = group.sentinels[0]
    first.suspend()
    try:
        with contextlib.closing(open_tier(group.url)) as tier:
            assert tier.contains(keys) == [False, False]
    finally:
        first.resume()
    wrong = group.url.replace("/mymaster", "/nosuch")
    with contextlib.closing(open_tier(wrong)) as tier, pytest.raises(TierUnavailable, match="'nosuch'"):
        tier.contains(keys)
    refused = group.url.partition("?")[0]
    with contextlib.closing(open_tier(refused)) as tier, pytest.raises(TierUnavailable, match="NOAUTH"):
        tier.contains(keys)
    nobody = "redis-sentinel://127.0.0.1:1,127.0.0.1:2"
    with (
        contextlib.closing(open_tier(nobody)) as tier,
        pytest.raises(TierUnavailable, match="no sentinel names"),
    ):
        tier.contains(keys)


@pytest.mark.parametrize(
    "how",
    [
        "killed",
        pytest.param("ordered", marks=pytest.mark.slow),
        pytest.param("suspended", marks=pytest.mark.slow),
    ],
)
def test_a_failover_under_load_loses_nothing_but_misses(how: str) -> None:
    keys = make_keys(6)
    frames = [make_frame(50_000, at) for at in range(6)]
    stopping = threading.Event()
    wrong: list[str] = []
    with RedisSentinel(password="pw") as group, contextlib.closing(open_tier(group.url)) as tier:

        def load() -> None:
            while not stopping.is_set():
                try:
                    tier.write(keys, frames)
                    for frame, result in zip(frames, read_frames(tier, keys, 50_000), strict=True):
                        if not isinstance(result, Miss) and result != bytes(frame):
                            wrong.append("other bytes")
                except TierUnavailable:
                    time.sleep(0.01)

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            old = group.master
            match how:
                case "ordered":
                    group.failover()
                case "killed":
                    old.kill()
                case _:
                    old.suspend()
            group.wait_for_other_master(old)
            group.master.ask("CONFIG", "RESETSTAT")
            group.wait_until(lambda: commands_of(group.master, "set") > 0)
            if how == "suspended":
                old.resume()
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        assert wrong == []
        retried(lambda: tier.write(keys, frames), TierUnavailable)
        assert read_frames(tier, keys, 50_000) == [bytes(frame) for frame in frames]


def test_a_master_that_was_demoted_is_not_written_to() -> None:
    """READONLY: the sentinels are asked again within the same call. They name the old one at first here."""
    with RedisSentinel() as group, contextlib.closing(open_tier(group.url)) as tier:
        keys = make_keys(3)
        tier.write(keys, [make_frame(10)] * 3)
        old, new = group.master, group.replica
        new.ask("REPLICAOF", "NO", "ONE")
        old.ask("REPLICAOF", "127.0.0.1", str(new.port))
        with pytest.raises(TierUnavailable, match=r"READONLY|role"):
            tier.write(keys, [make_frame(20)] * 3)
