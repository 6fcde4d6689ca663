"""What an LMCache client sees of our server, and what of it our own tier shares."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest
from raw_client import EXIST, GET, KEY, LIST, PUT, TENSOR, RawClient

from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.tiers.lm import LmOptions, LmTier


def test_what_was_put_comes_back_with_its_form(raw: RawClient) -> None:
    data = os.urandom(1_000_003)
    assert not raw.exists("m@1@0@1@half")
    raw.put("m@1@0@1@half", data)
    assert raw.exists("m@1@0@1@half")
    head, value = raw.get("m@1@0@1@half")
    # The reply has the location at its end, the request in front of the shape.
    assert head == (200, len(data), 1, 3, 2, 32, 256, 1024, 0)
    assert value == data


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 70_000])
def test_values_of_all_sizes(raw: RawClient, size: int) -> None:
    data = os.urandom(size)
    raw.put(KEY, data)
    assert raw.get(KEY)[1] == data


def test_a_key_that_is_not_held(raw: RawClient) -> None:
    assert raw.get("m@1@0@ffff@half") == ((400, 0, 1, 2, 0, 0, 0, 0, 0), b"")
    assert raw.healthy()


def test_overwriting(raw: RawClient) -> None:
    for data in (b"one", b"another", b""):
        raw.put(KEY, data)
        assert raw.get(KEY)[1] == data


def test_requests_sent_ahead_are_answered_in_order(raw: RawClient) -> None:
    for number in range(500):
        raw.put(f"m@1@0@{number:x}@half", b"%d" % number)
    for number in range(500):
        raw.request(GET, f"m@1@0@{number:x}@half")
    for number in range(500):
        head = raw.reply()
        assert raw.take(head[1]) == b"%d" % number


def test_a_list_has_the_keys(raw: RawClient) -> None:
    raw.put("listed@1@0@1@half", b"x")
    raw.request(LIST)
    code, length, *_ = raw.reply()
    keys = raw.take(length).split(b"\n")
    assert code == 200
    assert b"listed@1@0@1@half" in keys


def test_without_extensions_a_list_is_not_answered_as_in_lmcache() -> None:
    with RemoteServerThread(extensions=False) as server, RawClient(server.port) as client:
        client.request(LIST)
        assert client.healthy()


@pytest.mark.parametrize(
    ("command", "length"), [(0, 0), (6, 0), (-1, 0), (2**31 - 1, 0), (PUT, -1), (PUT, -(2**31)), (EXIST, -1)]
)
def test_what_breaks_the_protocol_is_hung_up_on(raw: RawClient, command: int, length: int) -> None:
    raw.request(command, KEY, length)
    assert raw.is_hung_up_on()


def test_a_value_that_is_too_large_is_dropped_and_the_client_goes_on() -> None:
    """LMCache's client never connects again, so it is not hung up on."""
    with RemoteServerThread(max_frame_bytes=100_000) as server, RawClient(server.port) as client:
        client.put(KEY, bytes(100_001))
        assert not client.exists(KEY)
        client.put(KEY, bytes(100_000))
        assert client.exists(KEY)
        assert server.service.counters.dropped_writes == 1


def test_a_token_shuts_lmcache_clients_out() -> None:
    with RemoteServerThread(token=b"secret") as server:
        for command in (PUT, GET, EXIST, LIST, 5):
            with RawClient(server.port) as client:
                client.request(command)
                assert client.is_hung_up_on()


def test_lmcache_clients_and_our_tier_share_one_server(
    remote_server: RemoteServerThread, raw: RawClient
) -> None:
    """A frame of ours under a key of up to 150 bytes is what an LMCache client gets, and the other way round."""
    (key,) = make_keys(1, "m")
    with contextlib.closing(LmTier(LmOptions(url=remote_server.url))) as tier:
        tier.write([key], [make_frame(1000)])
        head, value = raw.get(key)
        assert (head[0], value) == (200, bytes(make_frame(1000)))
        raw.put(key, b"from the other side")
        assert raw.healthy()
        assert read_frames(tier, [key]) == [b"from the other side"]


def test_a_get_in_progress_is_not_torn_by_a_put(remote_server: RemoteServerThread) -> None:
    """Each value is one byte, many times: a mix would show. Readers take their time."""
    failures = []
    values = [bytes([number]) * 3_000_000 for number in range(1, 5)]
    stop = threading.Event()

    def read() -> None:
        with RawClient(remote_server.port) as client:
            while not stop.is_set():
                client.request(GET, KEY)
                head = client.reply()
                first = client.take(1) if head[1] else b""
                rest = client.take(max(0, head[1] - 1))
                if head[1] and first + rest not in values:
                    failures.append(head)

    with RawClient(remote_server.port) as writer:
        writer.put(KEY, values[0])
        assert writer.healthy()
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for number in range(40):
            writer.put(KEY, values[number % 4])
        assert writer.healthy()
        stop.set()
        for reader in readers:
            reader.join()
    assert failures == []


def test_the_form_of_what_is_on_disk_too(tmp_path: Path) -> None:
    with RemoteServerThread(disk=str(tmp_path)) as server:
        with RawClient(server.port) as client:
            client.put(KEY, b"value")
            assert client.healthy()
        server.stop()
        server.start()
        with RawClient(server.port) as client:
            assert client.exists(KEY)
            assert client.get(KEY) == ((200, 5, TENSOR[0], TENSOR[1], *TENSOR[3:], TENSOR[2]), b"value")
