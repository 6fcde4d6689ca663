from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator

import pytest
import redis
import xxhash

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.testing.proxy import Flow, Link, Proxy
from kvstrata.testing.redis_cluster import RedisCluster
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import TierContract, make_frame, make_keys, read_frames
from kvstrata.tiers.base import Tier
from kvstrata.tiers.inspect import inspect_frame
from kvstrata.tiers.redis import RedisOptions, RedisTier
from kvstrata.tiers.redis.parts import MANIFEST_BYTES, Manifest
from kvstrata.tiers.redis.slots import slot_of
from kvstrata.types import Miss, MissReason

PART_BYTES = 4096


def open_tier(url: str, **options: object) -> RedisTier:
    return RedisTier(RedisOptions(url=url, **({"max_value_bytes": PART_BYTES} | options)))


@pytest.fixture
def tier(redis_server: RedisServer) -> Iterator[RedisTier]:
    redis_server.ask("FLUSHALL")
    with contextlib.closing(open_tier(redis_server.url)) as tier:
        yield tier


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_server.port) as client:
        yield client


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


class TestParts(TierContract):
    @pytest.fixture
    def tier(self, redis_server: RedisServer) -> Iterator[Tier]:
        redis_server.ask("FLUSHALL")
        with contextlib.closing(open_tier(redis_server.url, key_prefix="p:", ttl_seconds=50)) as tier:
            yield tier


class TestPartsInACluster(TierContract):
    @pytest.fixture
    def tier(self, cluster: RedisCluster) -> Iterator[Tier]:
        for node in cluster.nodes:
            node.ask("FLUSHALL")
        with contextlib.closing(open_tier(cluster.url, max_value_bytes=50_000)) as tier:
            yield tier


def part_names(client: redis.Redis) -> list[bytes]:
    return sorted(name for name in client.keys("*") if b"kv_bytes@" in name)


def test_the_size_decides(tier: RedisTier, client: redis.Redis) -> None:
    keys = make_keys(4)
    sizes = (PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES, 3 * PART_BYTES + 7)
    tier.write(keys, [make_frame(size, size) for size in sizes])
    assert read_frames(tier, keys, 20_000) == [bytes(make_frame(size, size)) for size in sizes]
    counts = [sum(name.startswith(key.encode()) for name in part_names(client)) for key in keys]
    assert counts == [0, 2, 3, 4]
    assert client.strlen(f"{keys[0]}kv_bytes") == PART_BYTES
    assert client.strlen(f"{keys[3]}kv_bytes") == MANIFEST_BYTES
    assert client.hget(f"{keys[3]}metadata", "parts") == b"4"
    assert client.hget(f"{keys[3]}metadata", "frame_bytes") == str(sizes[3]).encode()
    assert sorted(tier.scan()) == sorted(keys)
    assert [inspect_frame(tier, key).frame_bytes for key in keys] == list(sizes)
    assert tier.delete(keys) == 4
    assert client.keys("*") == []


def parts_of(client: redis.Redis, key: str) -> list[bytes]:
    return [name for name in part_names(client) if name.startswith(key.encode())]


def held(client: redis.Redis, key: str) -> list[bytes]:
    """What there is of a frame, without its metadata."""
    return sorted(name for name in client.keys("*") if name.startswith(f"{key}kv_bytes".encode()))


def test_a_missing_or_foreign_part_is_a_miss(tier: RedisTier, client: redis.Redis) -> None:
    keys = make_keys(3)
    tier.write(keys, [make_frame(10_000, at) for at in range(3)])
    client.delete(parts_of(client, keys[0])[1])
    client.set(parts_of(client, keys[1])[2], b"short")
    first, second, third = read_frames(tier, keys, 20_000)
    assert first == Miss(MissReason.ABSENT, "a part of the frame is gone")
    assert isinstance(second, Miss)
    assert second.reason == MissReason.CORRUPT
    assert third == bytes(make_frame(10_000, 2))


def test_a_frame_with_a_part_missing_is_dropped(tier: RedisTier, client: redis.Redis) -> None:
    keys = make_keys(4)
    tier.write(keys, [make_frame(10_000, at) for at in range(4)])
    for at in range(3):
        client.delete(parts_of(client, keys[at])[at])
    assert tier.contains(keys) == [True] * 4, "that is not known before it is read"
    read_frames(tier, keys, 20_000)
    assert tier.contains(keys) == [False] * 3 + [True]
    assert [held(client, key) for key in keys[:3]] == [[], [], []]
    tier.write(keys[:1], [make_frame(10_000, 9)])
    assert read_frames(tier, keys, 20_000)[::3] == [bytes(make_frame(10_000, at)) for at in (9, 3)]


def test_a_cluster_drops_it_too(cluster: RedisCluster) -> None:
    keys = make_keys(6)
    with contextlib.closing(open_tier(cluster.url)) as tier:
        tier.write(keys, [make_frame(10_000)] * 6)
        for key in keys:
            node = cluster.owner(f"{key}kv_bytes".encode())
            with redis.Redis(port=node.port, password=cluster.password) as client:
                client.delete(parts_of(client, key)[1])
        assert all(isinstance(result, Miss) for result in read_frames(tier, keys, 10_000))
        assert tier.contains(keys) == [False] * 6


@contextlib.contextmanager
def interrupted(server: RedisServer, verb: bytes, action: Callable[[], None]) -> Iterator[RedisTier]:
    """A reader; ``action`` happens once, just before the first command ``verb`` of it reaches the server."""
    left = [action]

    def rewrite(piece: bytes) -> bytes:
        if left and verb in piece:
            left.pop()()
        return piece

    link = Link(to_server=Flow(rewrite=rewrite))
    with (
        Proxy(("127.0.0.1", server.port), link) as proxy,
        contextlib.closing(open_tier(f"redis://{proxy.address}")) as reader,
    ):
        yield reader


def test_dropping_leaves_what_was_stored_meanwhile(
    redis_server: RedisServer, tier: RedisTier, client: redis.Redis
) -> None:
    """The reader found a part missing; before it drops the frame, the very same one is stored again."""
    (key,) = make_keys(1)
    tier.write([key], [make_frame(10_000)])
    client.delete(parts_of(client, key)[1])
    with interrupted(redis_server, b"EVAL", lambda: tier.write([key], [make_frame(10_000)])) as reader:
        assert isinstance(read_frames(reader, [key], 10_000)[0], Miss)
    assert read_frames(tier, [key], 10_000) == [bytes(make_frame(10_000))]
    assert len(held(client, key)) == 4


def test_parts_of_two_writes_never_meet(
    redis_server: RedisServer, tier: RedisTier, client: redis.Redis
) -> None:
    """Between a reader's two requests the same frame is stored again."""
    (key,) = make_keys(1)
    tier.write([key], [make_frame(10_000)])
    first = parts_of(client, key)
    with interrupted(redis_server, b"kv_bytes@", lambda: tier.write([key], [make_frame(10_000)])) as reader:
        assert isinstance(read_frames(reader, [key], 10_000)[0], Miss)
        assert reader.contains([key]) == [True]
        assert read_frames(reader, [key], 10_000) == [bytes(make_frame(10_000))]
    assert not set(first) & set(parts_of(client, key))


def test_who_may_not_drop_it_misses_it(
    redis_server: RedisServer, tier: RedisTier, client: redis.Redis
) -> None:
    (key,) = make_keys(1)
    tier.write([key], [make_frame(10_000)])
    client.delete(parts_of(client, key)[1])
    redis_server.ask("ACL", "SETUSER", "careful", "on", ">pw", "~*", "+@all", "-eval")
    try:
        url = redis_server.url.replace("://", "://careful:pw@")
        with contextlib.closing(open_tier(url)) as other:
            for _ in range(2):
                assert read_frames(other, [key], 20_000)[0].reason == MissReason.ABSENT
            other.write([key], [make_frame(10_000)])
            assert read_frames(other, [key], 20_000) == [bytes(make_frame(10_000))]
    finally:
        redis_server.ask("ACL", "DELUSER", "careful")


def test_what_is_evicted_in_parts_is_found_out() -> None:
    config = ["maxmemory 8mb", "maxmemory-policy allkeys-lru"]
    keys = make_keys(60)
    with (
        RedisServer(config) as server,
        contextlib.closing(open_tier(server.url, max_value_bytes=100_000)) as tier,
    ):
        for at, key in enumerate(keys):
            tier.write([key], [make_frame(300_000, at)])
        promised = tier.contains(keys)
        results = read_frames(tier, keys)
        gone = [key for key, result in zip(keys, results, strict=True) if isinstance(result, Miss)]
        assert len(keys) - len(gone) < sum(promised), "nothing was evicted in parts"
        assert not any(tier.contains(gone))
        for at, result in enumerate(results):
            assert isinstance(result, Miss) or result == bytes(make_frame(300_000, at))


def test_a_batch_has_one_deadline(redis_server: RedisServer) -> None:
    """Each request alone would be answered in time."""
    (key,) = make_keys(1)
    with Proxy(("127.0.0.1", redis_server.port)) as proxy:
        limits = {"timeout_seconds": 0.5, "connect_timeout_seconds": 0.1}
        with contextlib.closing(open_tier(f"redis://{proxy.address}", **limits)) as tier:
            tier.write([key], [make_frame(10_000)])
            proxy.link = Link(to_client=Flow(delay_seconds=0.4))
            with pytest.raises(TierUnavailable):
                tier.write([key], [make_frame(10_000)])
            with pytest.raises(TierUnavailable):
                read_frames(tier, [key], 10_000)
            proxy.link = Link()
            assert read_frames(tier, [key], 10_000) == [bytes(make_frame(10_000))]


def test_parts_cost_one_round_trip_and_only_to_be_read(redis_server: RedisServer) -> None:
    keys = make_keys(4)
    sent: list[bytes] = []

    def count(piece: bytes) -> bytes:
        sent.append(piece)
        return piece

    with Proxy(("127.0.0.1", redis_server.port)) as proxy:
        url = f"redis://{proxy.address}"
        for max_value_bytes, to_read in ((1 << 29, 1), (PART_BYTES, 2)):
            with contextlib.closing(open_tier(url, max_value_bytes=max_value_bytes)) as tier:
                tier.write(keys, [make_frame(10_000)] * 4)
                proxy.link = Link(to_server=Flow(rewrite=count))
                for asked, call in (
                    (1, tier.contains),
                    (to_read, lambda own: read_frames(tier, own, 10_000)),
                ):
                    sent.clear()
                    assert all(call(keys))
                    assert len(sent) == asked
                proxy.link = Link()


def test_a_part_that_is_refused_says_nothing_of_the_frame(redis_server: RedisServer, tier: RedisTier) -> None:
    (key,) = make_keys(1)
    tier.write([key], [make_frame(10_000)])
    redis_server.ask("ACL", "SETUSER", "half", "on", ">pw", "~*kv_bytes", "+@all")
    try:
        url = redis_server.url.replace("://", "://half:pw@")
        with contextlib.closing(open_tier(url)) as other:
            (result,) = read_frames(other, [key], 20_000)
    finally:
        redis_server.ask("ACL", "DELUSER", "half")
    assert isinstance(result, Miss)
    assert result.reason == MissReason.TIER_DOWN, "corrupt entries are deleted"


def test_overwriting_leaves_no_parts_behind(tier: RedisTier, client: redis.Redis) -> None:
    (key,) = make_keys(1)
    for size, count in ((20_000, 5), (10_000, 3), (100, 0), (9_000, 3), (9_000, 3)):
        tier.write([key], [make_frame(size, size)])
        assert read_frames(tier, [key], 20_000) == [bytes(make_frame(size, size))]
        assert len(part_names(client)) == count


def test_all_parts_expire_with_the_frame(redis_server: RedisServer, client: redis.Redis) -> None:
    redis_server.ask("FLUSHALL")
    (key,) = make_keys(1)
    with contextlib.closing(open_tier(redis_server.url, ttl_seconds=500, refresh_ttl=True)) as tier:
        tier.write([key], [make_frame(10_000)])
        names = client.keys("*")
        assert len(names) == 5
        assert all(490 < client.ttl(name) <= 500 for name in names)
        for name in names:
            client.expire(name, 100)
        assert read_frames(tier, [key], 10_000) == [bytes(make_frame(10_000))]
        assert all(490 < client.ttl(name) <= 500 for name in names)


def test_who_splits_otherwise_reads_and_deletes_it(redis_server: RedisServer, tier: RedisTier) -> None:
    keys = make_keys(2)
    tier.write(keys, [make_frame(10_000, at) for at in range(2)])
    with contextlib.closing(RedisTier(RedisOptions(url=redis_server.url))) as other:
        assert read_frames(other, keys, 10_000) == [bytes(make_frame(10_000, at)) for at in range(2)]
        assert read_frames(other, keys[:1], 9_999)[0].reason == MissReason.CORRUPT
        assert other.delete(keys) == 2
    assert redis_server.ask("DBSIZE") == 0


def test_a_full_server_keeps_no_half() -> None:
    config = ["maxmemory 8mb", "maxmemory-policy noeviction"]
    with (
        RedisServer(config) as server,
        contextlib.closing(open_tier(server.url, max_value_bytes=100_000)) as tier,
    ):
        keys = make_keys(2)
        tier.write(keys[:1], [make_frame(1_000_000)])
        entries = server.ask("DBSIZE")
        with pytest.raises(TierFull, match="OOM"):
            tier.write(keys[1:], [make_frame(9_000_000)])
        assert server.ask("DBSIZE") == entries
        assert tier.contains(keys) == [True, False]
        assert read_frames(tier, keys[:1]) == [bytes(make_frame(1_000_000))]


def test_a_frame_is_on_one_server_with_its_parts() -> None:
    for prefix in ("", "p:", "{kv}:"):
        name = f"{prefix}{make_keys(1)[0]}kv_bytes".encode()
        names = Manifest.of(bytes(10_000), 1024).names(name)
        assert len(set(names)) == 10
        assert {slot_of(part) for part in names} == {slot_of(name)}


def test_too_many_parts(redis_server: RedisServer) -> None:
    frame = memoryview(bytes(1024 * 4096 + 1))
    with contextlib.closing(open_tier(redis_server.url, max_value_bytes=1024)) as tier:
        with pytest.raises(TierFull, match="4096 parts"):
            tier.write(make_keys(1), [frame])
        keys = make_keys(2)
        tier.write(keys, [frame[:-1]] * 2)
        with redis.Redis(port=redis_server.port) as client:
            client.delete(parts_of(client, keys[0])[2000])
        assert isinstance(read_frames(tier, keys[:1], len(frame))[0], Miss)
        assert tier.contains(keys) == [False, True]
        assert tier.delete(keys) == 1


def test_a_frame_that_looks_like_a_manifest_is_a_frame(redis_server: RedisServer) -> None:
    frame = memoryview(Manifest(10_000, 100, bytes(16)).pack())
    (key,) = make_keys(1)
    with contextlib.closing(RedisTier(RedisOptions(url=redis_server.url))) as tier:
        tier.write([key], [frame])
        assert read_frames(tier, [key], 100) == [bytes(frame)]
        assert tier.delete([key]) == 1


def test_only_whole_manifests_are_taken() -> None:
    good = Manifest(10_000, 3_000, bytes(range(16)))
    assert Manifest.unpack(good.pack()) == good
    assert good.num_parts == 4
    for at in range(MANIFEST_BYTES):
        damaged = bytearray(good.pack())
        damaged[at] ^= 1
        assert Manifest.unpack(damaged) is None
    for frame_bytes, part_bytes in ((0, 1), (10, 0), (2**63, 1), (2**63, 2**40)):
        fields = struct.pack("<8sQQ16s", b"KVSPART1", frame_bytes, part_bytes, bytes(16))
        assert Manifest.unpack(fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))) is None
