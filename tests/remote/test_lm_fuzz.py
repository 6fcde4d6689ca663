"""Both ends of ``lm://`` fed with whatever: no crash, no hang, no memory above the limit."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstrata.errors import ProtocolError, TierFull, TierUnavailable
from kvstrata.remote.service import RemoteOptions, Service
from kvstrata.remote.session import Session
from kvstrata.tiers.lm import extended, plain, wire
from kvstrata.tiers.lm.connection import Connection
from kvstrata.types import Buffer, Miss

EDGES = [0, 1, 2, 5, 16, 36, 150, 186, 4095, 4096, 65_535, 2**20, 2**31 - 1, -1, -(2**31)]
WIDE = [0, 1, 5, 32, 2**16, 2**24, 2**31, 2**32 - 1]
LONG = [*WIDE, 2**40, 2**63, 2**64 - 1]

ints = st.sampled_from(EDGES) | st.integers(-(2**31), 2**31 - 1)
names = st.sampled_from([b"m@1@0@ab@half", b"k", b"", b"\xff" * 150, b"a b c"]) | st.binary(max_size=150)
requests = st.builds(
    lambda numbers, key, payload: struct.pack("<9i150s", *numbers, key.ljust(150)) + payload,
    st.tuples(st.integers(1, 5) | ints, st.integers(0, 60) | ints, ints, ints, ints, ints, ints, ints, ints),
    names,
    st.binary(max_size=80),
)
items = st.lists(st.tuples(st.integers(0, 100), names), max_size=4).map(
    lambda found: (len(found), b"".join(struct.pack("<IH", room, len(key)) + key for room, key in found))
)
calls = st.builds(
    lambda verb, listed, payload, ttl, checksum: (
        struct.pack("<BBHIIIQQ", verb, 0, 0, listed[0], len(listed[1]), ttl, len(payload), checksum)
        + listed[1]
        + payload
    ),
    st.integers(16, 22),
    items,
    st.just(b"") | st.binary(max_size=60),
    st.sampled_from(WIDE),
    st.sampled_from([0, 0, 0, 7]),
)
wild_calls = st.builds(
    lambda *numbers: struct.pack("<BBHIIIQQ", *numbers),
    st.integers(0, 255),
    st.integers(0, 1),
    st.integers(0, 1),
    *[st.sampled_from(WIDE)] * 3,
    *[st.sampled_from(LONG)] * 2,
)
hello = st.just(wire.hello_request(bytes(16)))
streams = st.one_of(
    st.binary(max_size=600),
    st.lists(requests, max_size=5).map(b"".join),
    st.tuples(hello, st.lists(calls | wild_calls, max_size=6).map(b"".join), st.binary(max_size=20)).map(
        b"".join
    ),
)


class FakeStream:
    """Gives ``data`` in pieces, then the end; counts what it gets."""

    def __init__(self, data: bytes, rng: random.Random) -> None:
        self._data = data
        self._rng = rng
        self.sent = 0
        self.closed = False

    async def receive(self, view: memoryview) -> int:
        count = min(len(view), len(self._data), self._rng.randrange(1, 300))
        view[:count], self._data = self._data[:count], self._data[count:]
        return count

    async def receive_all(self, view: memoryview) -> bool:
        done = 0
        while done < len(view) and (count := await self.receive(view[done:])):
            done += count
        return done == len(view)

    async def send(self, parts: Sequence[Buffer]) -> None:
        self.sent += sum(map(len, parts))

    def close(self) -> None:
        self.closed = True


def serve(runner: asyncio.Runner, service: Service, data: bytes, seed: int) -> None:
    async def run() -> None:
        stream = FakeStream(data, random.Random(seed))
        await Session(service, stream, "a fuzzer").run()
        assert stream.closed
        assert stream.sent < 1 << 20
        assert service.in_flight._free == service.in_flight.max_bytes
        store = service.store
        assert store.used_bytes == sum(-(-(e.size + 128) // 4096) * 4096 for e in store.entries)
        assert all(entry.pins == 0 for entry in store.entries)

    runner.run(run())


@contextlib.contextmanager
def fuzzed_service(token: bytes = b""):
    async def make() -> Service:
        return Service(RemoteOptions(host="", port=0, max_bytes=1 << 20, max_frame_bytes=10_000, token=token))

    service = asyncio.run(make())
    try:
        yield service
    finally:
        service.close()


def fuzz_server(count: int, token: bytes = b"") -> None:
    with asyncio.Runner() as runner, fuzzed_service(token) as service:

        @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
        @given(streams, st.integers(0, 2**32))
        def attempt(data: bytes, seed: int) -> None:
            serve(runner, service, data, seed)
            assert not token or not service.store.entries

        attempt()


def test_any_bytes_to_the_server() -> None:
    fuzz_server(1000)


def test_any_bytes_to_a_server_with_a_token_store_nothing() -> None:
    fuzz_server(300, b"secret")


@pytest.mark.slow
def test_any_bytes_to_the_server_many_times() -> None:
    fuzz_server(100_000)


# -- the client

replies = st.builds(
    lambda code, length, rest, body: struct.pack("<9i", code, length, *rest) + body,
    st.sampled_from([200, 200, 400, 0, -1]),
    st.integers(0, 60) | ints,
    st.tuples(*[ints] * 7),
    st.binary(max_size=60),
)
answers = st.builds(
    lambda verb, status, number, body, checksum: (
        struct.pack("<BBHIQQ", verb, status, 0, number, len(body), checksum) + body
    ),
    st.integers(16, 22),
    st.integers(0, 6),
    st.sampled_from(WIDE),
    st.binary(max_size=60) | st.just(bytes(24)) | items.map(lambda found: found[1]),
    st.sampled_from([0, 0, 0, 7]),
)
wild_answers = st.builds(
    lambda *numbers: struct.pack("<BBHIQQ", *numbers),
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 3),
    st.sampled_from(WIDE),
    *[st.sampled_from(LONG)] * 2,
)
from_server = st.one_of(
    st.binary(max_size=300),
    st.lists(replies, max_size=6).map(b"".join),
    st.lists(answers | wild_answers, max_size=6).map(b"".join),
)
KEYS = [b"one", b"another"]


def _introduce(connection: Connection, _: list[memoryview]) -> None:
    connection.introduce(b"")


def _introduce_with_token(connection: Connection, _: list[memoryview]) -> None:
    connection.introduce(b"token")


def _read(connection: Connection, buffers: list[memoryview]) -> None:
    results = extended.read(connection, KEYS, buffers, with_checksum=True)
    assert all(isinstance(result, Miss) or 0 <= result <= 40 for result in results)


def _read_plainly(connection: Connection, buffers: list[memoryview]) -> None:
    results = plain.read(connection, KEYS, buffers)
    assert all(isinstance(result, Miss) or 0 <= result <= 40 for result in results)


OPERATIONS: list[Callable[[Connection, list[memoryview]], object]] = [
    _introduce,
    _introduce_with_token,
    _read,
    _read_plainly,
    lambda connection, _: extended.contains(connection, KEYS),
    lambda connection, _: plain.contains(connection, KEYS),
    lambda connection, _: extended.delete(connection, KEYS),
    lambda connection, _: plain.delete(connection, KEYS),
    lambda connection, _: extended.scan_page(connection, b"", b""),
    lambda connection, _: extended.stats(connection),
    lambda connection, buffers: extended.write(connection, KEYS, buffers, ttl_seconds=0, with_checksum=False),
    lambda connection, buffers: plain.write(connection, KEYS, buffers),
]


def attempt_client(data: bytes, operation: Callable[[Connection, list[memoryview]], object]) -> None:
    """Whatever a server answers: a result within its bounds, or the declared error."""
    ours, theirs = socket.socketpair()
    memory = bytearray(b"\xaa" * 120)
    buffers = [memoryview(memory)[20:60], memoryview(memory)[60:100]]
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        connection = Connection(ours, "a fuzzer")
        connection.start(30.0)
        with contextlib.suppress(TierUnavailable, TierFull):
            operation(connection, buffers)
        connection.close()
    assert memory[:20] + memory[100:] == b"\xaa" * 40


@settings(max_examples=1000, deadline=None)
@given(from_server, st.sampled_from(OPERATIONS))
def test_any_bytes_to_the_client(data: bytes, operation: Callable[..., object]) -> None:
    attempt_client(data, operation)


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(from_server, st.sampled_from(OPERATIONS))
def test_any_bytes_to_the_client_many_times(data: bytes, operation: Callable[..., object]) -> None:
    attempt_client(data, operation)


# -- messages


@given(st.integers(1, 5), names, st.integers(0, 2**31 - 1), st.tuples(*[ints] * 7))
def test_requests_and_replies_come_back(command: int, key: bytes, length: int, form: tuple[int, ...]) -> None:
    made = wire.Form(form[0], form[1], form[2:6], form[6])
    request = wire.Request(command, key.strip(), length, made)
    assert wire.Request.unpack(request.pack()) == request
    assert len(request.pack()) == wire.REQUEST_BYTES == 186
    reply = wire.Reply(200, length, made)
    assert wire.Reply.unpack(reply.pack()) == reply
    assert len(reply.pack()) == wire.REPLY_BYTES == 36


@given(st.lists(st.tuples(st.binary(max_size=wire.MAX_KEY_BYTES // 8), st.integers(0, 2**32 - 1))))
def test_keys_come_back(keys: list[tuple[bytes, int]]) -> None:
    packed = wire.pack_keys([key for key, _ in keys], [room for _, room in keys])
    assert wire.unpack_keys(packed, len(keys)) == keys
    with pytest.raises(ProtocolError):
        wire.unpack_keys(packed, len(keys) + 1)


def test_plain_keys_are_ones_that_lmcache_takes_apart() -> None:
    for key in ("", "vllm@org/model@1@0@" + "ab" * 32, "x" * 5000):
        name = wire.plain_key(key)
        assert len(name) <= wire.PLAIN_KEY_BYTES
        model, world_size, worker, digest, dtype = name.decode().split("@")
        assert (model, int(world_size), int(worker), dtype) == ("kvstrata", 1, 0, "uint8")
        assert f"{int(digest, 16):064x}" == digest
    hello_key = wire.Request.unpack(wire.hello_request(b"\0" * 16)).key
    assert int(hello_key.split(b"@")[3], 16) == 0
    assert hello_key.split(b"@")[4] == b"uint8"
