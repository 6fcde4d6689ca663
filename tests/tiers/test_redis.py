from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest
import redis

from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.frame import HEADER_BYTES, FrameHeader, payload_checksum
from kvstrata.testing.proxy import Flow, Link, Proxy
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import TierContract, make_frame, make_keys, namespace, read_frames
from kvstrata.testing.waiting import retried, wait_until
from kvstrata.tiers.base import Tier
from kvstrata.tiers.redis import RedisOptions, RedisTier
from kvstrata.types import Miss, MissReason, TierStats

ACL_COMMANDS = "+ping +select +info +exists +get +getrange +set +hset +expire +unlink +scan +eval"


def open_tier(url: str, **options: object) -> RedisTier:
    return RedisTier(RedisOptions(url=url, **options))


def emptied(tier: RedisTier) -> RedisTier:
    tier.delete(list(tier.scan()))
    return tier


def login_url(server: RedisServer, user: str, password: str) -> str:
    return f"redis://{user}:{quote(password, safe='')}@127.0.0.1:{server.port}/0"


@pytest.fixture
def keys() -> list[str]:
    return make_keys(10)


@pytest.fixture
def tier(redis_server: RedisServer) -> Iterator[RedisTier]:
    with contextlib.closing(open_tier(redis_server.url)) as tier:
        yield emptied(tier)


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=redis_server.port) as client:
        yield client


class TestRedisTier(TierContract):
    @pytest.fixture
    def tier(self, redis_server: RedisServer) -> Iterator[Tier]:
        with contextlib.closing(open_tier(redis_server.url)) as tier:
            yield emptied(tier)


class TestRedisTierWithEverySetting(TierContract):
    @pytest.fixture
    def tier(self, password_server: RedisServer) -> Iterator[Tier]:
        settings = {"ttl_seconds": 1000, "refresh_ttl": True, "key_prefix": "größe*[1]?\\:", "num_workers": 2}
        with contextlib.closing(open_tier(password_server.url, **settings)) as tier:
            yield emptied(tier)


class TestRedisTierOnUnixSocket(TierContract):
    @pytest.fixture
    def tier(self, password_server: RedisServer) -> Iterator[Tier]:
        url = f"unix://:{quote(password_server.password, safe='')}@{password_server.socket_path}?db=2"
        with contextlib.closing(open_tier(url)) as tier:
            yield emptied(tier)


@pytest.mark.system
class TestRedisTierOverTLS(TierContract):
    @pytest.fixture
    def tier(self, tls_server: Any) -> Iterator[Tier]:
        with contextlib.closing(open_tier(tls_server.url())) as tier:
            yield emptied(tier)


def real_frame(key: str, payload: bytes) -> memoryview:
    space = namespace()
    frame = memoryview(bytearray(HEADER_BYTES + len(payload)))
    header = FrameHeader(
        shard=0,
        first_token=256,
        num_tokens=200,
        block_size=16,
        payload_bytes=len(payload),
        encoded_bytes=len(payload),
        layout_fingerprint=space.layout.fingerprint,
        chunk_hash=bytes.fromhex(key[-64:]),
        tokens_hash=bytes(32),
        payload_checksum=payload_checksum(payload),
        created_at=1_790_000_000,
        codec="naive",
        dtype="bfloat16",
    )
    header.pack_into(frame)
    frame[HEADER_BYTES:] = payload
    return frame


def test_two_entries_per_shard_that_people_can_read(
    tier: RedisTier, client: redis.Redis, keys: list[str]
) -> None:
    frame = real_frame(keys[0], b"payload")
    tier.write(keys[:1], [frame])
    assert sorted(client.keys("*")) == sorted([f"{keys[0]}kv_bytes".encode(), f"{keys[0]}metadata".encode()])
    assert client.get(f"{keys[0]}kv_bytes") == bytes(frame)
    assert client.hgetall(f"{keys[0]}metadata") == {
        b"model_name": b"org/model",
        b"format": b"naive",
        b"engine": b"vllm",
        b"world_size": b"1",
        b"worker_id": b"0",
        b"num_tokens": b"200",
        b"dtype": b"bfloat16",
        b"layout": namespace().layout.fingerprint.hex().encode(),
        b"payload_bytes": b"7",
        b"frame_bytes": str(HEADER_BYTES + 7).encode(),
        b"created_at": b"1790000000",
        b"version": b"1",
    }
    assert tier.delete(keys[:1]) == 1
    assert client.keys("*") == []


def test_either_entry_may_go_alone(tier: RedisTier, client: redis.Redis, keys: list[str]) -> None:
    tier.write(keys[:2], [make_frame(100)] * 2)
    client.delete(f"{keys[0]}metadata", f"{keys[1]}kv_bytes")
    assert tier.contains(keys[:2]) == [True, False]
    assert list(tier.scan()) == keys[:1]
    assert tier.delete(keys[:2]) == 1
    assert client.keys("*") == []


@pytest.mark.parametrize("refresh", [False, True])
def test_both_entries_expire_and_a_hit_can_start_the_time_anew(
    redis_server: RedisServer, client: redis.Redis, keys: list[str], refresh: bool
) -> None:
    names = [f"p:{keys[0]}kv_bytes", f"p:{keys[0]}metadata"]
    settings = {"ttl_seconds": 500, "refresh_ttl": refresh, "key_prefix": "p:"}
    with contextlib.closing(open_tier(redis_server.url, **settings)) as tier:
        tier.write(keys[:1], [make_frame(0)])
        assert all(490 < client.ttl(name) <= 500 for name in names)
        for name in names:
            client.expire(name, 100)
        assert read_frames(tier, keys[:2]) == [b"", Miss(MissReason.ABSENT)]
        assert all((client.ttl(name) > 100) is refresh for name in names)
        client.delete(*names)


def test_a_key_prefix_separates(redis_server: RedisServer, tier: RedisTier, keys: list[str]) -> None:
    with (
        contextlib.closing(open_tier(redis_server.url, key_prefix="a*")) as one,
        contextlib.closing(open_tier(redis_server.url, key_prefix="ab")) as other,
    ):
        one.write(keys[:1], [make_frame(10)])
        other.write(keys[1:2], [make_frame(10)])
        assert list(one.scan()) == keys[:1]
        assert list(other.scan()) == keys[1:2]
        assert tier.contains(keys[:2]) == [False, False]
        assert (one.delete(keys), other.delete(keys)) == (1, 1)


def test_the_entries_of_a_prefix_are_not_those_of_no_prefix(
    redis_server: RedisServer, tier: RedisTier, keys: list[str]
) -> None:
    with (
        contextlib.closing(open_tier(redis_server.url, key_prefix="team:")) as one,
        contextlib.closing(open_tier(redis_server.url, key_prefix="team:a:")) as other,
    ):
        one.write(keys[:1], [make_frame(10)])
        other.write(keys[1:2], [make_frame(10)])
        tier.write(keys[2:3], [make_frame(10)])
        assert [list(each.scan()) for each in (one, other, tier)] == [keys[:1], keys[1:2], keys[2:3]]
        assert (one.delete(keys), other.delete(keys)) == (1, 1)


def test_entries_of_others_are_left_out(tier: RedisTier, client: redis.Redis, keys: list[str]) -> None:
    client.mset({"kv_bytes": 1, "x@kv_bytes": 1, "a@b@c@d@ekv_bytes": 1, b"\xff\xfekv_bytes": 1, "other": 1})
    tier.write(keys[:1], [make_frame(10)])
    assert list(tier.scan()) == keys[:1]
    client.flushdb()


def test_an_entry_of_another_type_is_a_corrupt_miss(
    tier: RedisTier, client: redis.Redis, keys: list[str]
) -> None:
    tier.write(keys[:3], [make_frame(1000, at) for at in range(3)])
    client.delete(f"{keys[1]}kv_bytes", f"{keys[2]}metadata")
    client.rpush(f"{keys[1]}kv_bytes", "a list")
    client.set(f"{keys[2]}metadata", "a string")
    first, second, third = read_frames(tier, keys[:3])
    assert (first, third) == (bytes(make_frame(1000, 0)), bytes(make_frame(1000, 2)))
    assert isinstance(second, Miss)
    assert second.reason == MissReason.CORRUPT
    tier.write(keys[1:3], [make_frame(500, at) for at in range(2)])
    assert read_frames(tier, keys[1:3]) == [bytes(make_frame(500, at)) for at in range(2)]


def test_large_frames_in_large_batches(tier: RedisTier) -> None:
    """More than is asked for ahead, with values that are missing or too long in between."""
    keys, size = make_keys(12), 3_000_000
    tier.write(keys[::2], [make_frame(size, at) for at in range(6)])
    buffers = [memoryview(bytearray(size if at != 4 else size - 1)) for at in range(12)]
    results = tier.read(keys, buffers)
    assert [at for at, result in enumerate(results) if result == size] == [0, 2, 6, 8, 10]
    assert all(buffers[2 * at] == make_frame(size, at) for at in (0, 1, 3, 4, 5))
    assert results[4] == Miss(MissReason.CORRUPT, f"value of {size} bytes for a buffer of {size - 1}")


def test_no_more_connections_than_workers() -> None:
    keys = make_keys(200)
    with RedisServer() as server, redis.Redis(unix_socket_path=server.socket_path) as client:

        def num_others() -> int:
            return int(client.info("clients")["connected_clients"]) - 1

        wait_until(lambda: num_others() == 0, "nobody else has a connection")
        with contextlib.closing(open_tier(server.url, num_workers=3)) as tier:
            with ThreadPoolExecutor(12) as threads:
                list(threads.map(lambda key: tier.write([key], [make_frame(50_000)]), keys))
                assert all(threads.map(lambda key: tier.contains([key]) == [True], keys))
            assert 1 <= num_others() <= 3
        wait_until(lambda: num_others() == 0, "the tier's are closed")


# -- what the server says about itself


def test_the_first_connection_says_once_what_is_there(
    password_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    with contextlib.closing(open_tier(password_server.url, num_workers=4)) as tier:
        password = password_server.password
        assert password not in tier.describe() + repr(tier.options)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(tier.contains, [make_keys(1)] * 8))
    found, warning = [record for record in caplog.records if record.name.startswith("kvstrata.tiers.redis")]
    assert found.levelname == "INFO"
    assert "maxmemory not set, maxmemory-policy noeviction" in found.getMessage()
    assert warning.levelname == "WARNING"
    assert "allkeys-lru" in warning.getMessage()
    assert password not in caplog.text
    assert quote(password, safe="") not in caplog.text


def test_no_warning_where_room_is_made(caplog: pytest.LogCaptureFixture, keys: list[str]) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    with RedisServer(["maxmemory 100mb", "maxmemory-policy allkeys-lru"]) as server:
        with contextlib.closing(open_tier(server.url)) as tier:
            assert tier.contains(keys) == [False] * 10
            assert tier.stats().budget_bytes == 100 << 20
        server_log = [record for record in caplog.records if record.levelno >= logging.WARNING]
        with redis.Redis(port=server.port) as client:
            client.config_set("maxmemory-policy", "noeviction")
        with contextlib.closing(open_tier(server.url, ttl_seconds=5)) as tier:
            assert tier.contains(keys) == [False] * 10
    assert server_log == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


# -- faults


@pytest.mark.parametrize(
    ("user", "password", "text"),
    [
        ("", "wrong-pässword", "WRONGPASS"),
        ("nobody", "wrong-pässword", "WRONGPASS"),
        ("off_limits", "wrong-pässword", "WRONGPASS"),
    ],
)
def test_a_refused_login_is_unavailable(
    password_server: RedisServer, keys: list[str], user: str, password: str, text: str
) -> None:
    with contextlib.closing(open_tier(login_url(password_server, user, password))) as tier:
        with pytest.raises(TierUnavailable, match=text) as raised:
            tier.contains(keys)
        assert password not in str(raised.value)


def test_no_login_where_one_is_wanted(password_server: RedisServer, keys: list[str]) -> None:
    tier = open_tier(f"redis://127.0.0.1:{password_server.port}")
    with contextlib.closing(tier), pytest.raises(TierUnavailable, match="NOAUTH"):
        tier.write(keys[:1], [make_frame(100)])


def test_a_user_who_may_not_write(password_server: RedisServer, keys: list[str]) -> None:
    with contextlib.closing(open_tier(login_url(password_server, "reader", "reading"))) as tier:
        for _ in range(2):
            with pytest.raises(TierUnavailable, match="NOPERM"):
                tier.write(keys[:3], [make_frame(1000)] * 3)
            assert tier.contains(keys[:2]) == [False, False]
        with pytest.raises(TierUnavailable, match="NOPERM"):
            list(tier.scan())
        with pytest.raises(TierUnavailable, match="NOPERM"):
            tier.delete(keys)


def test_the_documented_commands_are_enough(keys: list[str]) -> None:
    with RedisServer([f"user kvstrata on >pw ~* resetchannels -@all {ACL_COMMANDS}"]) as server:
        url = login_url(server, "kvstrata", "pw").removesuffix("/0") + "/1"
        with contextlib.closing(
            open_tier(url, ttl_seconds=100, refresh_ttl=True, max_value_bytes=1024)
        ) as tier:
            frames = [make_frame(1000 * at, at) for at in range(10)]
            tier.write(keys, frames)
            tier.write(keys, frames)
            assert tier.contains(keys) == [True] * 10
            assert read_frames(tier, keys) == [bytes(frame) for frame in frames]
            assert sorted(tier.scan()) == sorted(keys)
            assert tier.stats().used_bytes > 0
            with redis.Redis(port=server.port, db=1) as client:
                client.delete(next(client.scan_iter(f"{keys[9]}kv_bytes@*")))
            assert isinstance(read_frames(tier, keys[9:])[0], Miss)
            assert tier.contains(keys) == [True] * 9 + [False]
            assert tier.delete(keys) == 9
        with redis.Redis(port=server.port, db=1) as client:
            assert client.dbsize() == 0
            assert client.acl_log() == []


def test_a_full_server_is_full_and_still_serves_reads(keys: list[str]) -> None:
    config = ["maxmemory 8mb", "maxmemory-policy noeviction"]
    with RedisServer(config) as server, contextlib.closing(open_tier(server.url)) as tier:
        tier.write(keys[:1], [make_frame(1_000_000)])
        for _ in range(3):
            with pytest.raises(TierFull, match="OOM"):
                tier.write(keys[1:9], [make_frame(1_500_000)] * 8)
        assert read_frames(tier, keys[:1]) == [bytes(make_frame(1_000_000))]
        held = tier.contains(keys)
        assert held[0]
        assert not all(held[:9])
        tier.delete(keys)
        tier.write(keys[:1], [make_frame(1000)])
        assert read_frames(tier, keys[:1]) == [bytes(make_frame(1000))]


def test_a_server_that_evicts_is_never_full() -> None:
    config = ["maxmemory 12mb", "maxmemory-policy allkeys-lru"]
    with RedisServer(config) as server, contextlib.closing(open_tier(server.url)) as tier:
        for at, key in enumerate(make_keys(40)):
            tier.write([key], [make_frame(1_000_000, at)])
        assert 0 < len(list(tier.scan())) < 40


def test_a_suspended_server_hits_the_deadline_and_serves_again(keys: list[str]) -> None:
    deadlines = {"timeout_seconds": 0.3, "connect_timeout_seconds": 0.3}
    with RedisServer() as server, contextlib.closing(open_tier(server.url, **deadlines)) as tier:
        retried(lambda: tier.write(keys[:2], [make_frame(100_000)] * 2), TierUnavailable)
        server.suspend()
        operations = (
            lambda: tier.contains(keys),
            lambda: read_frames(tier, keys),
            lambda: tier.write(keys[:4], [make_frame(5_000_000)] * 4),
            lambda: tier.delete(keys),
            lambda: list(tier.scan()),
            tier.stats,
        )
        for operation in operations:
            with pytest.raises(TierUnavailable, match="deadline"):
                operation()
        server.resume()
        retried(lambda: tier.write(keys[:1], [make_frame(1000)]), TierUnavailable)
        assert retried(lambda: read_frames(tier, keys[:1]), TierUnavailable) == [bytes(make_frame(1000))]


def test_a_killed_server_is_unavailable_and_found_again(keys: list[str]) -> None:
    with RedisServer() as server, contextlib.closing(open_tier(server.url)) as tier:
        for round_ in range(3):
            tier.write(keys[:2], [make_frame(100, round_)] * 2)
            server.kill()
            for _ in range(2):
                with pytest.raises(TierUnavailable, match="cannot connect"):
                    tier.contains(keys)
            server.start()
            assert tier.contains(keys[:1]) == [False]


def test_idle_connections_to_a_restarted_server_are_not_used(keys: list[str]) -> None:
    with RedisServer() as server, contextlib.closing(open_tier(server.url)) as tier:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(tier.contains, [make_keys(2000)] * 8))
        server.kill()
        server.start()
        for _ in range(5):
            assert tier.contains(keys) == [False] * 10


def test_killed_under_load_only_declared_errors_come_out_and_no_wrong_bytes() -> None:
    keys = make_keys(8)
    frames = [make_frame(2_000_000, at) for at in range(8)]
    with RedisServer() as server, contextlib.closing(open_tier(server.url)) as tier:

        def work(number: int) -> int:
            good = 0
            for turn in range(30):
                at = (number + turn) % 8
                try:
                    tier.write([keys[at]], [frames[at]])
                    (result,) = read_frames(tier, [keys[at]])
                except TierUnavailable:
                    time.sleep(0.01)
                    continue
                assert isinstance(result, Miss) or result == bytes(frames[at])
                good += 1
            return good

        with ThreadPoolExecutor(4) as threads:
            futures = [threads.submit(work, number) for number in range(4)]
            for _ in range(3):
                time.sleep(0.1)
                server.kill()
                server.start()
            assert sum(future.result() for future in futures) > 0
        tier.write(keys, frames)
        assert read_frames(tier, keys) == [bytes(frame) for frame in frames]


def test_nobody_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"redis://:secret@127.0.0.1:{bound.getsockname()[1]}"
        with contextlib.closing(open_tier(url)) as tier:
            with pytest.raises(TierUnavailable, match="refused") as raised:
                tier.contains(make_keys(1))
            assert "secret" not in str(raised.value)
    tier = open_tier("unix:///nowhere/redis.sock")
    with contextlib.closing(tier), pytest.raises(TierUnavailable, match="cannot connect"):
        tier.contains(make_keys(1))


def test_a_listener_that_never_accepts_is_late() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.closing(open_tier(url, connect_timeout_seconds=0.2)) as tier:
            for _ in range(3):
                with pytest.raises(TierUnavailable, match="deadline"):
                    tier.contains(make_keys(1))


def test_statistics_that_are_no_numbers_are_left_out(redis_server: RedisServer) -> None:
    def garble(piece: bytes) -> bytes:
        return re.sub(rb"(memory:)(\d+)", lambda found: found[1] + b"x" * len(found[2]), piece)

    garbling = Link(to_client=Flow(rewrite=garble))
    with (
        Proxy(("127.0.0.1", redis_server.port), garbling) as proxy,
        contextlib.closing(open_tier(f"redis://{proxy.address}")) as tier,
    ):
        assert tier.stats() == TierStats(used_bytes=0)


# -- TLS


@pytest.mark.system
def test_certificates_that_are_not_trusted_are_refused(
    tls_server: Any, strict_tls_server: Any, certificates: Any, keys: list[str]
) -> None:
    client = "&ssl_certfile={}&ssl_keyfile={}".format(*map(certificates.path, ("client.crt", "client.key")))
    unchecked = "&ssl_check_hostname=false"
    for url, text in (
        (tls_server.url("other_authority"), "certificate refused"),
        (strict_tls_server.url(more=client), "certificate refused.*127.0.0.1"),
        (strict_tls_server.url(more=unchecked), "rediss://127.0.0.1"),
    ):
        tier = open_tier(url)
        with contextlib.closing(tier), pytest.raises(TierUnavailable, match=text):
            tier.contains(keys)
    for url in (
        tls_server.url("other_authority", "&ssl_cert_reqs=none"),
        strict_tls_server.url(more=unchecked + client),
    ):
        with contextlib.closing(open_tier(url)) as tier:
            assert tier.contains(keys) == [False] * 10


@pytest.mark.system
def test_a_suspended_server_hits_the_deadline_over_tls(tls_server: Any, keys: list[str]) -> None:
    deadlines = {"timeout_seconds": 0.5, "connect_timeout_seconds": 0.5}
    with contextlib.closing(open_tier(tls_server.url(), **deadlines)) as tier:
        retried(lambda: tier.write(keys[:1], [make_frame(1000)]), TierUnavailable)
        tls_server.server.suspend()
        try:
            with pytest.raises(TierUnavailable, match="deadline"):
                read_frames(tier, keys[:1])
            with pytest.raises(TierUnavailable, match="deadline"):
                tier.write(keys[:1], [make_frame(20_000_000)])
        finally:
            tls_server.server.resume()
        assert retried(lambda: read_frames(tier, keys[:1]), TierUnavailable) == [bytes(make_frame(1000))]


def test_a_plain_server_where_tls_is_expected(redis_server: RedisServer, keys: list[str]) -> None:
    tier = open_tier(f"rediss://127.0.0.1:{redis_server.port}", connect_timeout_seconds=0.5)
    with contextlib.closing(tier), pytest.raises(TierUnavailable):
        tier.contains(keys)


# -- settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ttl_seconds": 0}, "ttl_seconds"),
        ({"max_value_bytes": 0}, "max_value_bytes"),
        ({"max_value_bytes": 1 << 30}, "max"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_tier("redis://127.0.0.1", **settings)


def test_tls_files_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="TLS files"):
        open_tier("rediss://h?ssl_ca_certs=/nowhere")
