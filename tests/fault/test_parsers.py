"""Every parser of what comes from outside, fed with what a seeded generator makes of real messages.

Whatever comes in ends in a value or in the one declared error: no other exception, no wait, no memory beyond
what the input itself warrants. CI runs some thousands of each; ``make test-faults`` runs 100,000.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from kvstrata.cache.frames import Transfer, accept_frame, encode_frame, prepare
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import Decoders
from kvstrata.errors import PoolError, ProtocolError, TierUnavailable
from kvstrata.frame import HEADER_BYTES, MAX_GROWTH_BYTES, FrameHeader
from kvstrata.memory import handover
from kvstrata.protocol import messages as m
from kvstrata.protocol.framing import decode_reply, decode_request, encode
from kvstrata.server.dispatch import Dispatcher
from kvstrata.server.sessions import Sessions
from kvstrata.testing.client import make_namespace, prompt
from kvstrata.testing.core import open_core
from kvstrata.tiers.redis.resp import Connection, ErrorReply, TooLong, command
from kvstrata.types import Hit, KVLayout, Miss, Piece, Slot

SEED = 20_261_122
LIMIT_BYTES = 4 << 20
"""No input here is longer than some kilobytes."""
HUNG_SECONDS = 60.0
EDGES = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63))

pytestmark = pytest.mark.fault_suite
COUNTS = pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])


def damaged(rng: random.Random, message: bytes, others: Sequence[bytes]) -> bytes:
    """``message`` as a broken or hostile peer might send it."""
    data = bytearray(message)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                size = rng.choice([1, 2, 4, 8])
                data[at : at + size] = (rng.choice(EDGES) % 256**size).to_bytes(
                    size, rng.choice(["little", "big"])
                )  # type: ignore[arg-type]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(20))
            case 4:
                other = rng.choice(others)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case 5:
                del data[at : at + rng.randrange(1, 20)]
            case 6:
                data[at:at] = b"%d" % rng.choice(EDGES)
            case _:
                data = bytearray(rng.randbytes(rng.randrange(300)))
    return bytes(data)


def feed(attempt: Callable[[random.Random], None], count: int) -> None:
    """Call ``attempt`` with a seeded generator, ``count`` times, and watch memory and time."""
    rng = random.Random(SEED)
    attempt(rng)
    tracemalloc.start()
    try:
        for number in range(count):
            if number % 1000 == 0:
                tracemalloc.clear_traces()
                tracemalloc.reset_peak()
            started = time.monotonic()
            attempt(rng)
            assert time.monotonic() - started < HUNG_SECONDS
            if number % 1000 == 999:
                assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()


# RESP

RESP = [
    b"+OK\r\n",
    b"-ERR unknown command\r\n-OOM command not allowed\r\n",
    b":1\r\n:0\r\n:1\r\n:12345\r\n",
    b"$5\r\nhello\r\n$0\r\n\r\n$-1\r\n",
    b"*2\r\n$1\r\n0\r\n*3\r\n$1\r\na\r\n$1\r\nb\r\n:7\r\n",
    b"$30\r\nredis_version:7.0\r\nmaxmemory:0\r\n",
    command(b"GET", b"key"),
    b"$40\r\n" + bytes(40) + b"\r\n:1\r\n",
]


@COUNTS
def test_resp(count: int) -> None:
    memory = bytearray(b"\xaa" * 80)

    def attempt(rng: random.Random) -> None:
        data = damaged(rng, b"".join(rng.choices(RESP, k=rng.randrange(1, 4))), RESP)
        ours, theirs = socket.socketpair()
        connection = Connection(ours, "peer")
        with theirs, contextlib.closing(connection):
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            connection.start(HUNG_SECONDS)
            with pytest.raises(TierUnavailable) as ended:
                read_on(rng, connection, memoryview(memory)[20:60])
            assert connection.closed
            assert "deadline" not in str(ended.value)
        assert memory[:20] + memory[60:] == b"\xaa" * 40

    feed(attempt, count)


def read_on(rng: random.Random, connection: Connection, buffer: memoryview) -> None:
    """Read replies of any kind, until the input breaks the protocol or ends."""
    while True:
        match rng.randrange(3):
            case 0:
                connection.reply()
            case 1:
                assert all(isinstance(value, int | ErrorReply) for value in connection.integers(3))
            case _:
                size = connection.bulk_into(buffer)
                assert size is None or isinstance(size, ErrorReply | TooLong) or 0 <= size <= len(buffer)


# ZMQ messages, down to the core

SPACE = make_namespace(world_size=2)
ASKED = prompt(200, seed=1, namespace=SPACE)
HASHES = tuple(piece.chunk_hash for piece in ASKED.pieces)
REQUESTS: list[m.Request] = [
    m.Hello(m.PROTOCOL_VERSION, "session", "fuzz"),
    m.Register(SPACE),
    m.Lookup("r", SPACE.fingerprint, ASKED.prefix),
    m.Release("r"),
    m.Reserve(SPACE.fingerprint, 1, tuple(ASKED.pieces)),
    m.Commit(0, HASHES),
    m.Abort(1, HASHES),
    m.Fetch("r", 0, SPACE.fingerprint, HASHES),
    m.ReportPrefill(SPACE.fingerprint, 1000, 0.5),
    m.Clear(SPACE.fingerprint),
    m.Clear(tiers=False),
    m.ListKeys("vllm@", 10),
    m.GetStats(),
    m.Ping(),
    m.Goodbye(),
]
REPLIES: list[m.Reply] = [
    m.Welcome("1.0", "pool", "/run/pool.sock", 256),
    m.LookupReply(
        Hit(num_tokens=64, pieces=(Piece(b"h" * 32, b"p" * 32, 0, 64),), offsets=((4096,),), pool_id="p")
    ),
    m.Reserved((Slot(4096, 100), None), "pool"),
    m.Fetched(True),
    m.Keys(("a", "b")),
    m.Stats({"l1": {"entries": 1}, "tiers": []}),
    m.Refused("because"),
]


def altered(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """A message that is well formed, with something in it that is not as it should be."""
    match value:
        case dict() if value and rng.random() < 0.95:
            name = rng.choice(list(value))
            return value | {name: altered(rng, value[name], depth + 1)}
        case list() if value and rng.random() < 0.7:
            at = rng.randrange(len(value))
            return [*value[:at], altered(rng, value[at], depth + 1), *value[at + 1 :]]
        case list():
            return value * rng.choice([0, 2, 3])
        case bytes():
            return rng.choice([value[:-1], value + b"x", rng.randbytes(32), value[:32] + value, b""])
        case bool():
            return not value
        case int():
            return rng.choice([*EDGES, value + 1, value * 2])
        case float():
            return rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e308])
        case str() if depth:
            return rng.choice([value, "", value + "\0", "ü" * 100, value * 3])
        case _:
            return rng.choice([None, 0, b"", "", [], {}])


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    with open_core() as cache:
        sessions = Sessions(cache, time.monotonic)
        yield Dispatcher(cache, sessions, "/nowhere", None)
        sessions.close()


@COUNTS
def test_requests(dispatcher: Dispatcher, count: int) -> None:
    encoded = [bytes(encode(7, request)[1]) for request in REQUESTS]

    def attempt(rng: random.Random) -> None:
        for request in REQUESTS[:2]:
            dispatcher.dispatch(b"i", request, ())
        message = rng.choice(encoded)
        match rng.randrange(4):
            case 0:
                message = damaged(rng, message, encoded)
            case 1 | 2:
                message = msgspec.msgpack.encode(altered(rng, msgspec.msgpack.decode(message)))
            case _:
                pass
        payloads = [rng.randbytes(rng.choice([0, 1, 100])) for _ in range(rng.randrange(3))]
        parts = [memoryview(part) for part in (bytes(8), message, *payloads)]
        try:
            _, request, given = decode_request(parts)
            reply, sent = dispatcher.dispatch(b"i", request, given)
        except ProtocolError:
            return
        if isinstance(reply, Iterator):
            reply = m.Cleared(sum(reply))
        answer = [memoryview(part) for part in encode(7, reply, sent)] if reply is not None else None
        if answer is not None:
            assert type(decode_reply(answer)[1]) is type(reply)

    feed(attempt, count)


@COUNTS
def test_replies(count: int) -> None:
    encoded = [bytes(encode(7, reply)[1]) for reply in REPLIES]

    def attempt(rng: random.Random) -> None:
        message = rng.choice(encoded)
        if rng.random() < 0.5:
            message = damaged(rng, message, encoded)
        else:
            message = msgspec.msgpack.encode(altered(rng, msgspec.msgpack.decode(message)))
        first = rng.choice([bytes(8), rng.randbytes(rng.randrange(12))])
        with contextlib.suppress(ProtocolError):
            decode_reply([memoryview(first), memoryview(message)])

    feed(attempt, count)


# Frames

PAYLOAD_BYTES = 600
NAIVE = NaiveCodec()
DECODERS = Decoders()
LAYOUT = KVLayout(block_size=16, page_bytes=(PAYLOAD_BYTES,), dtype="bfloat16", kernel_format="test")


def new_transfer(seed: int) -> Transfer:
    expected = FrameHeader(
        shard=0,
        first_token=64,
        num_tokens=16,
        block_size=16,
        payload_bytes=PAYLOAD_BYTES,
        encoded_bytes=PAYLOAD_BYTES,
        layout_fingerprint=b"l" * 16,
        chunk_hash=bytes([seed]) * 32,
        tokens_hash=b"t" * 32,
        payload_checksum=b"",
        created_at=1,
        codec=NaiveCodec.name,
        dtype="bfloat16",
    )
    room = memoryview(bytearray(HEADER_BYTES + PAYLOAD_BYTES + MAX_GROWTH_BYTES))
    return Transfer("key", room[: HEADER_BYTES + PAYLOAD_BYTES], expected, LAYOUT, room)


def frame_of(seed: int) -> bytes:
    transfer = new_transfer(seed)
    prepare(transfer)
    transfer.payload[:] = random.Random(seed).randbytes(PAYLOAD_BYTES)
    return bytes(encode_frame(transfer, NAIVE))


def rechecked(rng: random.Random, frame: bytes) -> bytes:
    """``frame`` with a field changed and a header whose checksum is right for it: a lie that is consistent."""
    header = FrameHeader.unpack(frame)
    field = rng.choice(["shard", "num_tokens", "payload_bytes", "encoded_bytes", "codec", "chunk_hash"])
    lie: Any = {"codec": rng.choice(["x", "zip", ""]), "chunk_hash": rng.randbytes(32)}.get(
        field, rng.choice(EDGES) % 2**32
    )
    data = bytearray(frame)
    msgspec.structs.replace(header, **{field: lie}).pack_into(memoryview(data))
    return bytes(data)


@COUNTS
def test_frames(count: int) -> None:
    frames = [frame_of(seed) for seed in range(4)]
    payload = frames[0][HEADER_BYTES:]
    transfer = new_transfer(0)

    def attempt(rng: random.Random) -> None:
        data = frames[0] if rng.random() < 0.2 else damaged(rng, rng.choice(frames), frames)
        if rng.random() < 0.2:
            data = rechecked(rng, frames[0])
        frame = transfer.slot[: len(data)]
        frame[:] = data[: len(frame)]
        miss = accept_frame(transfer, frame, DECODERS)
        assert isinstance(miss, Miss) or transfer.payload == payload

    feed(attempt, count)


# The handover of the pool

HANDOVER = [
    handover._HEADER.pack(b"KVSP", 1, 4, 1 << 20) + b"pool",
    handover._HEADER.pack(b"KVSP", 2, 0, 1 << 20),
    b"session-7",
]


@COUNTS
def test_handover(count: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(HUNG_SECONDS)
    null = os.open(os.devnull, os.O_RDONLY)

    def attempt(rng: random.Random) -> None:
        message = damaged(rng, rng.choice(HANDOVER), HANDOVER) or b"\0"
        descriptors = [null] * rng.randrange(4)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        theirs.sendmsg([message], ancillary if descriptors else [])
        if rng.random() < 0.3:
            said = handover.read_session(ours)
            assert said is not None
            return
        received, fds = handover._receive(ours)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(PoolError):
            size_bytes, pool_id = handover._parse(received, len(fds))
            assert 0 <= size_bytes < 2**64
            assert len(pool_id) <= len(message)

    with ours, theirs:
        try:
            feed(attempt, count)
        finally:
            os.close(null)
