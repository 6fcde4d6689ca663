from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from kvstrata.errors import TierPartlyUnavailable, TierUnavailable
from kvstrata.testing.process import free_port
from kvstrata.testing.redis_cluster import RedisCluster, slot_of
from kvstrata.testing.redis_server import RedisServer, server_binary
from kvstrata.testing.tier import TierContract, make_frame, make_keys, read_frames
from kvstrata.testing.waiting import retried, wait_until
from kvstrata.tiers.base import Tier
from kvstrata.tiers.redis import RedisOptions, RedisTier
from kvstrata.tiers.redis.resp import Reply
from kvstrata.types import Miss, MissReason


def open_tier(url: str, **options: object) -> RedisTier:
    limits = {"timeout_seconds": 3.0, "connect_timeout_seconds": 3.0}
    return RedisTier(RedisOptions(url=url, **(limits | options)))


def flush(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        node.ask("FLUSHALL")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster(password="p@ss w/rd") as cluster:
        yield cluster


@pytest.fixture
def tier(cluster: RedisCluster) -> Iterator[RedisTier]:
    flush(cluster)
    with contextlib.closing(open_tier(cluster.url, timeout_seconds=5)) as tier:
        yield tier


@pytest.fixture(scope="module")
def tls_cluster(certificates: Any) -> Iterator[tuple[RedisCluster, str]]:
    """A cluster that speaks TLS between its nodes too, and its URL."""
    ports = [free_port() for _ in range(3)]
    common = [
        f"tls-cert-file {certificates.path('server.crt')}",
        f"tls-key-file {certificates.path('server.key')}",
        f"tls-ca-cert-file {certificates.path('authority.crt')}",
        "tls-auth-clients no",
        "tls-cluster yes",
        "tls-replication yes",
    ]
    own = [[f"tls-port {port}"] for port in ports]
    with RedisCluster(
        config=common, node_configs=own, meet_ports=ports, binary=server_binary(tls=True)
    ) as cluster:
        ca = certificates.path("authority.crt")
        yield cluster, f"rediss-cluster://127.0.0.1:{ports[1]}?ssl_ca_certs={ca}"


class TestCluster(TierContract):
    @pytest.fixture
    def tier(self, cluster: RedisCluster) -> Iterator[Tier]:
        flush(cluster)
        with contextlib.closing(open_tier(cluster.url, timeout_seconds=5)) as tier:
            yield tier


@pytest.mark.system
class TestClusterOverTLS(TierContract):
    @pytest.fixture
    def tier(self, tls_cluster: tuple[RedisCluster, str]) -> Iterator[Tier]:
        found, url = tls_cluster
        flush(found)
        with contextlib.closing(open_tier(url, timeout_seconds=5, ttl_seconds=100, refresh_ttl=True)) as tier:
            yield tier


def value_name(key: str) -> str:
    return f"{key}kv_bytes"


def names_of(node: RedisServer) -> set[Reply]:
    """Of the Redis entries that lie on a node, whoever serves them."""
    names = node.ask("KEYS", "*")
    assert isinstance(names, list)
    return set(names)


def held_by(node: RedisServer, keys: list[str]) -> set[str]:
    """The keys whose frames lie on a node, whoever serves them."""
    names = names_of(node)
    return {key for key in keys if value_name(key).encode() in names}


def test_an_independent_client_finds_the_entries(cluster: RedisCluster, tier: RedisTier) -> None:
    keys = make_keys(30)
    frames = [make_frame(500, at) for at in range(30)]
    tier.write(keys, frames)
    with redis.RedisCluster(
        host="127.0.0.1", port=cluster.nodes[0].port, password=cluster.password
    ) as client:
        assert [client.get(value_name(key)) for key in keys] == [bytes(frame) for frame in frames]
        assert all(client.hget(f"{key}metadata", "frame_bytes") == b"500" for key in keys)
    assert min(len(held_by(node, keys)) for node in cluster.nodes) > 0
    assert tier.stats().used_bytes > 0


def test_what_was_found_is_said_once(cluster: RedisCluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    with contextlib.closing(open_tier(cluster.url)) as tier:
        for _ in range(3):
            tier.contains(make_keys(50))
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "a cluster of 3 masters" in text]) == 1
    assert len([text for text in said if "maxmemory-policy" in text and "answers in" in text]) == 3
    assert "ss%20w" not in caplog.text
    assert "p@ss" not in caplog.text


def test_the_documented_commands_are_enough(cluster: RedisCluster) -> None:
    flush(cluster)
    commands = "+ping +select +info +exists +get +getrange +set +hset +expire +unlink +scan +eval"
    commands += " +cluster|slots +asking"
    for node in cluster.nodes:
        node.ask("ACL", "SETUSER", "kvstrata", "on", ">pw", "~*", "-@all", *commands.split())
        node.ask("ACL", "LOG", "RESET")
    keys = make_keys(10, seed=7)
    url = f"redis-cluster://kvstrata:pw@{cluster.url.rpartition('@')[2]}"
    with contextlib.closing(open_tier(url, ttl_seconds=100, refresh_ttl=True)) as tier:
        source = cluster.owner(value_name(keys[0]))
        target = next(node for node in cluster.nodes if node is not source)
        cluster.begin_migration(slot_of(value_name(keys[0])), source, target)
        tier.write(keys, [make_frame(100)] * 10)
        assert read_frames(tier, keys, 100) == [bytes(make_frame(100))] * 10
        assert sorted(tier.scan()) == sorted(keys)
        assert tier.delete(keys) == 10
        cluster.end_migration(slot_of(value_name(keys[0])), source, target)
    assert [node.ask("ACL", "LOG") for node in cluster.nodes] == [[], [], []]


def test_a_plain_server_is_no_cluster(redis_server: RedisServer) -> None:
    tier = open_tier(f"redis-cluster://127.0.0.1:{redis_server.port}")
    with contextlib.closing(tier), pytest.raises(TierUnavailable, match="cluster support disabled"):
        tier.contains(make_keys(1))


def test_seeds_that_are_gone_are_passed_over(cluster: RedisCluster) -> None:
    with RedisServer() as deaf:
        deaf.suspend()
        url = cluster.url + f",127.0.0.1:{deaf.port}"
        login, _, hosts = url.rpartition("@")
        swapped = f"{login}@" + ",".join(reversed([*hosts.split(","), "127.0.0.1:1"]))
        flush(cluster)
        with contextlib.closing(open_tier(swapped, connect_timeout_seconds=6.0)) as tier:
            assert tier.contains(make_keys(5)) == [False] * 5
        deaf.resume()


def test_moved_slots_are_followed(cluster: RedisCluster, tier: RedisTier) -> None:
    keys = make_keys(20)
    frames = [make_frame(3000, at) for at in range(20)]
    tier.write(keys, frames)
    for key in keys[:5]:
        source = cluster.owner(value_name(key))
        target = next(node for node in cluster.nodes if node is not source)
        cluster.migrate(slot_of(value_name(key)), source, target)
        assert key in held_by(target, keys)
    assert read_frames(tier, keys, 3000) == [bytes(frame) for frame in frames]
    assert tier.contains(keys) == [True] * 20
    tier.write(keys[:5], [make_frame(10, at) for at in range(5)])
    assert tier.delete(keys) == 20
    assert [held_by(node, keys) for node in cluster.nodes] == [set()] * 3


def test_a_slot_that_is_being_moved_is_asked_for_on_both_sides(
    cluster: RedisCluster, tier: RedisTier
) -> None:
    (key,) = make_keys(1, seed=1)
    slot = slot_of(value_name(key))
    source = cluster.owner(value_name(key))
    target = next(node for node in cluster.nodes if node is not source)
    cluster.begin_migration(slot, source, target)
    assert tier.contains([key]) == [False]
    tier.write([key], [make_frame(2000, 1)])  # what is new goes to the target
    assert held_by(target, [key]) == {key}
    assert tier.contains([key, *make_keys(5)]) == [True, *[False] * 5]
    assert read_frames(tier, [key], 2000) == [bytes(make_frame(2000, 1))]
    assert read_frames(tier, [key], 1999)[0].reason == MissReason.CORRUPT
    cluster.end_migration(slot, source, target)
    assert read_frames(tier, [key], 2000) == [bytes(make_frame(2000, 1))]
    assert tier.delete([key]) == 1


def test_slots_move_under_load_and_nothing_is_lost(cluster: RedisCluster, tier: RedisTier) -> None:
    keys = make_keys(12, seed=2)
    frames = [make_frame(30_000, at) for at in range(12)]
    tier.write(keys, frames)
    stopping = threading.Event()
    seen: list[str] = []
    failures: list[str] = []

    def load() -> None:
        while not stopping.is_set():
            held = tier.contains(keys)
            for frame, result, is_held in zip(frames, read_frames(tier, keys, 30_000), held, strict=True):
                if isinstance(result, Miss) or not is_held:
                    seen.append("a miss")
                elif result != bytes(frame):
                    failures.append("other bytes")

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(2):
            for key in keys:
                source = cluster.owner(value_name(key))
                target = cluster.nodes[(cluster.nodes.index(source) + 1) % 3]
                cluster.migrate(slot_of(value_name(key)), source, target)
    finally:
        stopping.set()
        thread.join()
    assert failures == []
    assert read_frames(tier, keys, 30_000) == [bytes(frame) for frame in frames]
    assert len(seen) < 50, "nearly all are found while their slots move"


@pytest.mark.parametrize("how", ["killed", pytest.param("suspended", marks=pytest.mark.slow)])
def test_a_lost_node_loses_its_slots_only(how: str) -> None:
    keys = make_keys(60)
    frames = [make_frame(1000, at) for at in range(60)]
    with RedisCluster(node_timeout_ms=60_000) as cluster, contextlib.closing(open_tier(cluster.url)) as tier:
        tier.write(keys, frames)
        lost = cluster.nodes[1]
        mine = held_by(lost, keys)
        assert 0 < len(mine) < 60
        (lost.kill if how == "killed" else lost.suspend)()
        for _ in range(3):
            assert tier.contains(keys) == [key not in mine for key in keys]
            for key, frame, result in zip(keys, frames, read_frames(tier, keys, 1000), strict=True):
                if key in mine:
                    assert isinstance(result, Miss)
                    assert result.reason == MissReason.TIER_DOWN
                else:
                    assert result == bytes(frame)
        with pytest.raises(TierPartlyUnavailable):
            tier.write(sorted(mine)[:1], [make_frame(10)])
        (lost.start if how == "killed" else lost.resume)()

        retried(lambda: tier.write(keys, frames), TierPartlyUnavailable)
        assert read_frames(tier, keys, 1000) == [bytes(frame) for frame in frames]
        for node in cluster.nodes:
            node.kill()
        with pytest.raises(TierUnavailable, match="cannot connect"):
            tier.contains(keys)


def test_a_replica_takes_over() -> None:
    keys = make_keys(40)
    frames = [make_frame(1000, at) for at in range(40)]
    with RedisCluster(replicas_per_master=1) as cluster, contextlib.closing(open_tier(cluster.url)) as tier:
        tier.write(keys, frames)
        master, replica = cluster.nodes[0], cluster.nodes[3]
        # WAIT is no help: it answers for what its own connection has written.
        wait_until(lambda: names_of(replica) == names_of(master), "the replica holds it all")
        master.kill()
        # Redis itself takes a few seconds to promote it, and as many more for each vote that fails.
        wait_until(lambda: all(tier.contains(keys)), "the replica is used", 60)
        assert read_frames(tier, keys, 1000) == [bytes(frame) for frame in frames]


def test_a_cluster_that_says_it_is_down() -> None:
    """With cluster-require-full-coverage, Redis' default, one lost node stops all."""
    config = ["cluster-require-full-coverage yes"]
    with (
        RedisCluster(config=config, node_timeout_ms=300) as cluster,
        contextlib.closing(open_tier(cluster.url)) as tier,
    ):
        keys = make_keys(30)
        assert tier.contains(keys) == [False] * 30
        cluster.nodes[2].kill()

        def is_down() -> bool:
            try:
                tier.contains(keys)
            except TierUnavailable:
                return True
            return False

        wait_until(is_down, "the tier is down")
        cluster.nodes[2].start()
        wait_until(lambda: not is_down(), "the tier is used again")
