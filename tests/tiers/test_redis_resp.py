from __future__ import annotations

import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.redis.resp import (
    INPUT_BYTES,
    MAX_BULK_BYTES,
    MAX_REPLY_BYTES,
    Connection,
    ErrorReply,
    TooLong,
    command,
)


class Peer:
    """The two ends of a socket: a connection, and the one that plays the server."""

    def __init__(self) -> None:
        ours, self.server = socket.socketpair()
        self.connection = Connection(ours, "peer")
        self.connection.start(60)

    def says(self, data: bytes, *, and_ends: bool = True) -> Connection:
        self.server.sendall(data)
        if and_ends:
            self.server.shutdown(socket.SHUT_WR)
        return self.connection

    def close(self) -> None:
        self.connection.close()
        self.server.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


def test_commands() -> None:
    assert command(b"GET", b"key") == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"


def test_replies_of_every_type(peer: Peer) -> None:
    connection = peer.says(
        b"+OK\r\n-ERR no\r\n:-12\r\n$3\r\na\r\n\r\n$0\r\n\r\n$-1\r\n*-1\r\n*3\r\n:1\r\n*0\r\n$1\r\nx\r\n"
    )
    replies = [connection.reply() for _ in range(8)]
    assert replies == [b"OK", ErrorReply("ERR no"), -12, b"a\r\n", b"", None, None, [1, [], b"x"]]
    assert connection.idle
    assert ErrorReply("OOM command not allowed").code == "OOM"


def test_values_go_to_the_buffer_and_nowhere_else(peer: Peer) -> None:
    memory = bytearray(b"." * 12)
    connection = peer.says(b"$5\r\nhello\r\n$0\r\n\r\n$-1\r\n-WRONGTYPE x\r\n$5\r\nworld\r\n:1\r\n")
    buffer = memoryview(memory)[2:9]
    assert connection.bulk_into(buffer) == 5
    assert memory == b"..hello....."
    assert connection.bulk_into(buffer) == 0
    assert connection.bulk_into(buffer) is None
    assert connection.bulk_into(buffer) == ErrorReply("WRONGTYPE x")
    assert connection.bulk_into(buffer[:4]) == TooLong(5)
    assert connection.integers(1) == [1]
    assert memory == b"..hello....."


def test_a_long_value_that_does_not_fit_is_dropped_in_order(peer: Peer) -> None:
    size = 20 * INPUT_BYTES
    sender = threading.Thread(target=peer.says, args=(b"$%d\r\n%b\r\n:7\r\n" % (size, bytes(size)),))
    sender.start()
    assert peer.connection.bulk_into(memoryview(bytearray(10))) == TooLong(size)
    assert peer.connection.reply() == 7
    sender.join()


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_replies_in_small_pieces(peer: Peer, step: int) -> None:
    data = (
        b"$5\r\nhello\r\n" + b":1\r\n:0\r\n:12\r\n-ERR x\r\n:1\r\n" + b"*2\r\n$1\r\n0\r\n*1\r\n$3\r\nkey\r\n"
    )

    def trickle() -> None:
        for at in range(0, len(data), step):
            peer.server.sendall(data[at : at + step])
            time.sleep(0.0005)

    sender = threading.Thread(target=trickle)
    sender.start()
    buffer = memoryview(bytearray(5))
    assert peer.connection.bulk_into(buffer) == 5
    assert buffer == b"hello"
    assert peer.connection.integers(5) == [1, 0, 12, ErrorReply("ERR x"), 1]
    assert peer.connection.reply() == [b"0", [b"key"]]
    sender.join()


def test_many_integers(peer: Peer) -> None:
    expected = [number % 2 for number in range(50_000)]
    sender = threading.Thread(target=peer.says, args=(b"".join(b":%d\r\n" % number for number in expected),))
    sender.start()
    assert peer.connection.integers(50_000) == expected
    sender.join()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"$",
        b"$5\r\nhel",
        b"$5\r\nhello",
        b"$5\r\nhello..",
        b"$4\r\nhello\r\n",
        b"$-2\r\n\r\n",
        b"$+5\r\nhello\r\n",
        b"$5_0\r\nhello\r\n",
        b"$ 5\r\nhello\r\n",
        b"$\xd9\xa5\r\nhello\r\n",
        b"$\r\n\r\n",
        b"$5\nhello\r\n",
        b"$%d\r\n" % (MAX_BULK_BYTES + 1),
        b"$" + b"9" * 900 + b"\r\n",
        b"+OK\r\n",
        b":5\r\n",
        b"*1\r\n$5\r\nhello\r\n",
        b"hello\r\n",
        b"\r\n",
        b"x" * 5000,
        b"-" + b"x" * 5000,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_what_is_no_value_closes_the_connection(peer: Peer, data: bytes) -> None:
    with pytest.raises(TierUnavailable):
        peer.says(data).bulk_into(memoryview(bytearray(5)))
    assert peer.connection.closed


@pytest.mark.parametrize(
    "data",
    [
        b"*70000\r\n",
        b"*2\r\n*40000\r\n" + b":1\r\n" * 40_000 + b"*40000\r\n",
        b"*1\r\n" * 100 + b":1\r\n",
        b"$%d\r\n" % (MAX_REPLY_BYTES + 1),
        b"*2\r\n$10\r\n0123456789\r\n$%d\r\n" % (MAX_REPLY_BYTES - 5),
        b":%d\r\n" % (1 << 64),
        b":\r\n",
        b":--1\r\n",
        b"%1\r\n+a\r\n+b\r\n",
        b"*-2\r\n",
    ],
)
def test_what_is_over_a_limit_closes_the_connection(peer: Peer, data: bytes) -> None:
    sender = threading.Thread(target=peer.says, args=(data,))
    sender.start()
    with pytest.raises(TierUnavailable):
        peer.connection.reply()
    assert peer.connection.closed
    sender.join()


@pytest.mark.parametrize(
    "data", [b"$%d\r\nabc" % MAX_REPLY_BYTES, b"*65536\r\n:1\r\n", b"*60000\r\n*5000\r\n*300\r\n"]
)
def test_nothing_is_allocated_for_what_is_only_announced(peer: Peer, data: bytes) -> None:
    connection = peer.says(data)
    tracemalloc.start()
    try:
        with pytest.raises(TierUnavailable):
            connection.reply()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_trickle_does_not_move_the_deadline(peer: Peer) -> None:
    stop = threading.Event()

    def trickle() -> None:
        peer.server.sendall(b"$1000\r\n")
        while not stop.wait(0.02):
            peer.server.sendall(b"x")

    peer.connection.start(0.3)
    sender = threading.Thread(target=trickle)
    sender.start()
    try:
        with pytest.raises(TierUnavailable, match="deadline"):
            peer.connection.bulk_into(memoryview(bytearray(1000)))
        assert peer.connection.closed
    finally:
        stop.set()
        sender.join()


def test_a_peer_that_does_not_read_hits_the_deadline(peer: Peer) -> None:
    peer.connection.start(0.2)
    with pytest.raises(TierUnavailable, match="deadline"):
        peer.connection.send([bytes(1000)] * 3 + [memoryview(bytearray(50_000_000)), b"end"])
    assert peer.connection.closed


def test_many_parts_arrive_in_order(peer: Peer) -> None:
    parts = [bytes([number % 256]) * (number * 37 % 5000) for number in range(3000)]
    received = bytearray()

    def receive() -> None:
        while data := peer.server.recv(1 << 20):
            received.extend(data)

    receiver = threading.Thread(target=receive)
    receiver.start()
    peer.connection.send([memoryview(part) for part in parts])
    peer.connection.close()
    receiver.join()
    assert received == b"".join(parts)


TOKENS = st.sampled_from(
    [b"$", b"*", b":", b"+", b"-", b"\r\n", b"\r", b"\n", b"-1", b"0", b"3", b"abc", b"OK", b"99999999"]
)
REPLIES = st.one_of(
    st.binary(max_size=60).map(lambda data: b"$%d\r\n%b\r\n" % (len(data), data)),
    st.integers().map(lambda number: b":%d\r\n" % number),
    st.integers(-2, 5).map(lambda count: b"*%d\r\n" % count),
    st.binary(max_size=20).map(lambda text: b"+" + text + b"\r\n"),
    st.just(b"-ERR x\r\n"),
    st.just(b"$-1\r\n"),
)
STREAMS = st.one_of(
    st.binary(max_size=200),
    st.lists(TOKENS, max_size=40).map(b"".join),
    st.lists(REPLIES, max_size=10).map(b"".join),
    st.tuples(st.lists(REPLIES, max_size=5).map(b"".join), st.binary(max_size=30)).map(b"".join),
)
CALLS = st.lists(st.sampled_from(["reply", "integers", "bulk"]), min_size=1, max_size=12)


def run_calls(data: bytes, calls: list[str]) -> None:
    """Whatever comes in: replies within their bounds, or the one declared error and a closed connection."""
    peer = Peer()
    memory = bytearray(b"\xaa" * 80)
    buffer = memoryview(memory)[20:60]
    try:
        connection = peer.says(data)
        for call in calls:
            match call:
                case "reply":
                    connection.reply()
                case "integers":
                    assert len(connection.integers(3)) == 3
                case _:
                    result = connection.bulk_into(buffer)
                    if isinstance(result, int):
                        assert 0 <= result <= 40
                        assert bytes(buffer[:result]) in data
    except TierUnavailable:
        assert peer.connection.closed
    finally:
        peer.close()
    assert memory[:20] + memory[60:] == b"\xaa" * 40


@settings(max_examples=1000, deadline=None)
@given(STREAMS, CALLS)
def test_any_bytes_end_in_replies_or_the_declared_error(data: bytes, calls: list[str]) -> None:
    run_calls(data, calls)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(STREAMS, CALLS)
def test_any_bytes_many_times(data: bytes, calls: list[str]) -> None:
    run_calls(data, calls)
