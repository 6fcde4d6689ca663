from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from kvstrata.errors import TierPartlyUnavailable, TierUnavailable
from kvstrata.testing.proxy import Flow, Link, Proxy
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import TierContract, make_frame, make_keys, read_frames
from kvstrata.testing.waiting import retried, wait_until
from kvstrata.tiers.base import Tier
from kvstrata.tiers.redis import RedisOptions, RedisTier
from kvstrata.tiers.redis.slots import NUM_SLOTS, share_slots, slot_of
from kvstrata.types import Miss, MissReason


def url_of(servers: Sequence[RedisServer]) -> str:
    return "redis://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)


def open_tier(servers: Sequence[RedisServer], **options: object) -> RedisTier:
    limits = {"timeout_seconds": 2.0, "connect_timeout_seconds": 2.0}
    return RedisTier(RedisOptions(url=url_of(servers), **(limits | options)))


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RedisServer]]:
    with RedisServer() as first, RedisServer() as second, RedisServer() as third:
        yield [first, second, third]


@pytest.fixture
def tier(servers: list[RedisServer]) -> Iterator[RedisTier]:
    for server in servers:
        server.ask("FLUSHALL")
    with contextlib.closing(open_tier(servers, timeout_seconds=5)) as tier:
        yield tier


class TestRing(TierContract):
    @pytest.fixture
    def tier(self, servers: list[RedisServer]) -> Iterator[Tier]:
        for server in servers:
            server.ask("FLUSHALL")
        with contextlib.closing(open_tier(servers, timeout_seconds=5, num_workers=2)) as tier:
            yield tier


# -- shares


def test_slots_are_those_of_redis() -> None:
    for name in ("a", "vllm@m@1@0@00kv_bytes", "{tag}x", "x{tag}y{z}", "{}x", "{", "x{}{a}", ""):
        assert slot_of(name.encode()) == redis.cluster.key_slot(name.encode())


def test_a_server_more_or_less_moves_only_its_own_share() -> None:
    labels = ["a:6379/0", "b:6379/0", "c:6379/0"]
    three = [labels[at] for at in share_slots(labels)]
    assert all(0.3 < three.count(label) / NUM_SLOTS < 0.37 for label in labels)
    reordered = ["c:6379/0", "a:6379/0", "b:6379/0"]
    assert [reordered[at] for at in share_slots(reordered)] == three
    four = [[*labels, "d:6379/0"][at] for at in share_slots([*labels, "d:6379/0"])]
    assert all(after in (before, "d:6379/0") for before, after in zip(three, four, strict=True))
    two = [labels[at] for at in share_slots(labels[:2])]
    assert all(before in (after, "c:6379/0") for before, after in zip(three, two, strict=True))
    assert three[:6] == ["a:6379/0", "a:6379/0", "c:6379/0", "c:6379/0", "b:6379/0", "c:6379/0"]


def test_entries_are_spread_and_found_by_a_tier_with_another_order(
    tier: RedisTier, servers: list[RedisServer]
) -> None:
    keys = make_keys(100)
    tier.write(keys, [make_frame(100, at) for at in range(100)])
    held = [server.ask("DBSIZE") for server in servers]
    assert sum(held) == 200
    assert min(held) > 30
    with contextlib.closing(open_tier(servers[::-1])) as other:
        assert read_frames(other, keys, 200) == [bytes(make_frame(100, at)) for at in range(100)]
        assert other.stats().used_bytes > 0
        assert other.delete(keys) == 100


def test_more_threads_than_connections_wait_for_each_other(
    servers: list[RedisServer], tier: RedisTier
) -> None:
    keys = make_keys(50)
    frames = [make_frame(20_000, at) for at in range(50)]
    with contextlib.closing(open_tier(servers, num_workers=1, timeout_seconds=20)) as narrow:

        def work(_: int) -> bool:
            narrow.write(keys, frames)
            return read_frames(narrow, keys, 20_000) == [bytes(frame) for frame in frames]

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(work, range(8)))
    tier.delete(keys)


def test_all_servers_are_asked_before_any_answer_is_awaited(servers: list[RedisServer]) -> None:
    """Each answer is held back until the other server has been asked: with one after the other none would come."""
    asked = [threading.Event(), threading.Event()]
    was_alone: list[int] = []

    def link(own: int) -> Link:
        def question(data: bytes) -> bytes:
            asked[own].set()
            return data

        def answer(data: bytes) -> bytes:
            if not asked[1 - own].wait(10):
                was_alone.append(own)
            return data

        return Link(to_server=Flow(rewrite=question), to_client=Flow(rewrite=answer))

    addresses = [("127.0.0.1", server.port) for server in servers]
    with Proxy(addresses[0]) as first, Proxy(addresses[1]) as second:
        url = f"redis://{first.address},{second.address}"
        with contextlib.closing(RedisTier(RedisOptions(url=url, timeout_seconds=30))) as tier:
            keys = make_keys(40)
            tier.write(keys, [make_frame(100)] * 40)
            for operation in (
                lambda: tier.contains(keys) == [True] * 40,
                lambda: read_frames(tier, keys, 100) == [bytes(make_frame(100))] * 40,
            ):
                for event in asked:
                    event.clear()
                first.link, second.link = link(0), link(1)
                assert operation()
                first.link = second.link = Link()
            assert tier.delete(keys) == 40
    assert was_alone == []


# -- faults


@pytest.mark.parametrize(
    ("how", "max_value_bytes"), [("killed", 1 << 29), ("suspended", 1 << 29), ("killed", 1024)]
)
def test_a_lost_server_loses_its_share_only(
    how: str, max_value_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    keys = make_keys(60)
    frames = [make_frame(3000, at) for at in range(60)]
    with (
        RedisServer() as first,
        RedisServer() as second,
        contextlib.closing(open_tier([first, second], max_value_bytes=max_value_bytes)) as tier,
    ):
        tier.write(keys, frames)
        with redis.Redis(port=first.port) as client:
            mine = {key for key in keys if client.exists(f"{key}kv_bytes")}
        assert 0 < len(mine) < 60
        (first.kill if how == "killed" else first.suspend)()
        for _ in range(3):
            assert tier.contains(keys) == [key not in mine for key in keys]
            for key, frame, result in zip(keys, frames, read_frames(tier, keys, 3000), strict=True):
                if key in mine:
                    assert isinstance(result, Miss)
                    assert result.reason == MissReason.TIER_DOWN
                else:
                    assert result == bytes(frame)
        (lost,) = sorted(mine)[:1]
        with pytest.raises(TierPartlyUnavailable, match=str(first.port)):
            tier.write([lost], [make_frame(10)])
        with pytest.raises(TierPartlyUnavailable):
            tier.delete(keys[:30])
        with pytest.raises(TierPartlyUnavailable, match="not all servers"):
            list(tier.scan())
        assert tier.stats().used_bytes > 0
        tier.write([key for key in keys[30:] if key not in mine][:1], [make_frame(10)])
        (first.start if how == "killed" else first.resume)()
        if how == "suspended":
            left = sorted(mine - set(keys[:30]))
            wait_until(lambda: any(tier.contains(left)), "what it has is found again")
        retried(lambda: tier.write(keys, frames), TierPartlyUnavailable)
        assert read_frames(tier, keys, 3000) == [bytes(frame) for frame in frames]
    assert caplog.text.count("is left alone") == 1
    assert caplog.text.count("/0 answers again") == 1


def test_a_lost_server_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is left alone no connection to it is tried but by the probe."""
    with RedisServer() as server, socket.create_server(("127.0.0.1", 0), backlog=0) as deaf:
        url = f"{server.url.rpartition('/')[0]},127.0.0.1:{deaf.getsockname()[1]}"
        limits = {"timeout_seconds": 1.0, "connect_timeout_seconds": 1.0}
        with contextlib.closing(RedisTier(RedisOptions(url=url, **limits))) as tier:
            tier.contains(make_keys(20))
            (lost,) = [each for each in tier._topology.servers() if each.outage.reason]
            monkeypatch.setattr(lost, "acquire", None)
            monkeypatch.setattr(lost.outage, "_probe", lambda: None)
            assert lost.outage.reason
            for _ in range(3):
                tier.contains(make_keys(20))


def test_all_servers_down_is_unavailable(servers: list[RedisServer]) -> None:
    keys = make_keys(20)
    with (
        RedisServer() as first,
        RedisServer() as second,
        contextlib.closing(open_tier([first, second])) as tier,
    ):
        assert tier.contains(keys) == [False] * 20
        first.kill()
        second.kill()
        for _ in range(2):
            with pytest.raises(TierUnavailable, match="cannot connect"):
                tier.contains(keys)
            with pytest.raises(TierUnavailable):
                tier.write(keys[:1], [make_frame(10)])
            with pytest.raises(TierUnavailable):
                tier.stats()
        second.start()
        assert retried(lambda: tier.contains(keys), TierUnavailable) == [False] * 20
