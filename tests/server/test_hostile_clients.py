"""A server that is sent nonsense goes on serving everybody else."""

from __future__ import annotations

import contextlib
import random
import socket
import uuid
from collections.abc import Iterator, Sequence

import msgspec
import pytest
import zmq

from kvstrata.client import RemoteClient
from kvstrata.protocol import messages as m
from kvstrata.protocol.framing import Part, decode_reply, encode
from kvstrata.testing.client import look, make_namespace, prompt, small_settings, store
from kvstrata.testing.forked import ForkedServer, ServerHost
from kvstrata.testing.waiting import wait_until
from kvstrata.types import Piece, Prefix

SPACE = make_namespace()


@pytest.fixture(scope="module")
def server_host() -> Iterator[ServerHost]:
    with ServerHost() as host:
        yield host


@pytest.fixture
def server(server_host: ServerHost) -> Iterator[ForkedServer]:
    with server_host.start(small_settings()) as server:
        yield server


@pytest.fixture
def client(server: ForkedServer) -> Iterator[RemoteClient]:
    with RemoteClient(server.endpoint, "decent", timeout_seconds=10) as client:
        assert client.wait_connected(10)
        yield client


class RawClient:
    """A socket that says what it is told to."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self._socket.connect(endpoint)

    def say(self, parts: Sequence[Part]) -> None:
        self._socket.send_multipart(parts)

    def hear(self) -> tuple[int, m.Reply]:
        sequence, reply, _ = decode_reply([memoryview(p) for p in self._socket.recv_multipart()])
        return sequence, reply

    def ask(self, message: m.Message, sequence: int = 1) -> m.Reply:
        self.say(encode(sequence, message))
        answered, reply = self.hear()
        assert answered == sequence
        return reply

    def close(self) -> None:
        self._context.destroy(linger=200)


@pytest.fixture
def raw(server: ForkedServer) -> Iterator[RawClient]:
    with contextlib.closing(RawClient(server.endpoint)) as client:
        yield client


def serves(client: RemoteClient) -> bool:
    """Whether another client is still served, on the same session."""
    asked = prompt(200, seed=1)
    store(client, asked)
    return look(client, uuid.uuid4().hex, asked) == 200 and client.num_failures == 0


def test_junk_on_the_socket(client: RemoteClient, raw: RawClient) -> None:
    rng = random.Random(0)
    ping = bytes(encode(0, m.Ping())[1])
    for number in range(500):
        parts = [rng.randbytes(rng.randrange(0, 40)) for _ in range(rng.randrange(1, 6))]
        if number % 2:
            parts = [number.to_bytes(8, "little"), *parts]
        if number % 7 == 0:
            damaged = bytearray(ping)
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            parts = [number.to_bytes(8, "little"), bytes(damaged)]
        raw.say(parts)
    raw.say([b"\0" * 8, b"\x82\xa4type\xa4Ping\xa1x" + b"\x91" * 200_000 + b"\x01"])
    raw.say([b"\0" * 8, b"\x82\xa4type\xa8ListKeys\xa6prefix\xa2\xff\xfe"])
    raw.say([b""])
    raw.say([b"\0" * 8, b"", *[b""] * 5000])
    raw.say(encode(2**64 - 1, m.Ping()))
    while (answer := raw.hear())[0] != 2**64 - 1:
        assert isinstance(answer[1], m.Refused | m.Done)
    assert serves(client)


def test_junk_below_zmq(server: ForkedServer, client: RemoteClient) -> None:
    host, _, port = server.endpoint.removeprefix("tcp://").partition(":")
    rng = random.Random(0)
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(rng.randbytes(rng.randrange(1, 2000)))
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert serves(client)


def test_another_protocol_version_is_refused(client: RemoteClient, raw: RawClient) -> None:
    for version in (m.PROTOCOL_VERSION + 1, m.PROTOCOL_VERSION - 1, -1, 2**62):
        reply = raw.ask(m.Hello(version, "s", "stranger"))
        assert isinstance(reply, m.Refused)
        assert str(version) in reply.reason
        assert "install the same version" in reply.reason
    assert isinstance(raw.ask(m.Register(SPACE)), m.UnknownSession)
    assert client.stats()["sessions"] == 1
    assert serves(client)


def test_a_client_of_another_version_goes_on_without_a_server(
    server: ForkedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(m, "PROTOCOL_VERSION", m.PROTOCOL_VERSION + 1)
    with RemoteClient(server.endpoint, "stranger", timeout_seconds=5) as client:
        wait_until(lambda: client.connected or "refused us" in caplog.text, "an answer")
        assert not client.connected
        asked = prompt(200, seed=1)
        assert store(client, asked) == 0
        assert client.lookup("r", asked.namespace, asked.prefix).num_tokens == 0
        assert caplog.text.count("refused us") == 1, "it does not ask again at once"


def test_requests_before_hello(client: RemoteClient, raw: RawClient) -> None:
    for message in (m.Register(SPACE), m.Fetch("r", 0, b"", ()), m.Reserve(SPACE.fingerprint, 0, ())):
        assert isinstance(raw.ask(message), m.UnknownSession)
    for message in (m.Release("r"), m.Commit(0, (b"h" * 32,)), m.Abort(0, ()), m.Goodbye()):
        raw.say(encode(5, message))
    assert raw.ask(m.Ping(), 6) == m.Done()  # what is told gets no reply
    assert serves(client)


PREFIX = Prefix(b"h" * 32, b"", 16, b"r" * 32)
PIECE = Piece(b"h" * 32, b"p" * 32, 0, 64)
HASH = b"h" * 32
BAD: list[m.Message] = [
    m.Register(msgspec.structs.replace(SPACE, world_size=0)),
    m.Register(msgspec.structs.replace(SPACE, chunk_size=0)),
    m.Register(msgspec.structs.replace(SPACE, layout=msgspec.structs.replace(SPACE.layout, block_size=0))),
    m.Lookup("r", SPACE.fingerprint, msgspec.structs.replace(PREFIX, num_tokens=2**60)),
    m.Lookup("r", SPACE.fingerprint, msgspec.structs.replace(PREFIX, root=b"")),
    m.Reserve(SPACE.fingerprint, -1, (PIECE,)),
    m.Reserve(SPACE.fingerprint, 2**40, (PIECE,)),
    m.Reserve(SPACE.fingerprint, 0, (msgspec.structs.replace(PIECE, num_tokens=-64),)),
    m.Reserve(SPACE.fingerprint, 0, (msgspec.structs.replace(PIECE, first_token=-1),)),
    m.Reserve(SPACE.fingerprint, 0, (msgspec.structs.replace(PIECE, chunk_hash=b"short"),)),
    m.Fetch("r", 99, SPACE.fingerprint, (HASH,)),
    m.Fetch("r", 0, SPACE.fingerprint, (b"",)),
]


@pytest.mark.parametrize("message", BAD, ids=lambda message: type(message).__name__)
def test_requests_that_contradict_themselves_are_refused(
    client: RemoteClient, raw: RawClient, message: m.Message
) -> None:
    assert isinstance(raw.ask(m.Hello(m.PROTOCOL_VERSION, "s", "bad")), m.Welcome)
    assert raw.ask(m.Register(SPACE)) == m.Done()
    assert isinstance(raw.ask(message), m.Refused)
    assert serves(client)


def test_what_is_only_told_may_be_wrong_too(client: RemoteClient, raw: RawClient) -> None:
    raw.ask(m.Hello(m.PROTOCOL_VERSION, "s", "bad"))
    raw.ask(m.Register(SPACE))
    for message in (
        m.Commit(-1, (HASH,)),
        m.Commit(2**50, (HASH,)),
        m.Commit(0, (b"",)),
        m.Abort(-1, (HASH,)),
        m.Abort(0, (b"x",)),
        m.ReportPrefill(SPACE.fingerprint, -5, -1.0),
        m.ReportPrefill(SPACE.fingerprint, 5, float("nan")),
        m.ReportPrefill(SPACE.fingerprint, 5, float("inf")),
        m.ReportPrefill(b"unknown", 5, 1.0),
        m.Release("never"),
    ):
        raw.say(encode(3, message))
    assert raw.ask(m.ListKeys("", -5), 4) == m.Keys(())
    assert client.stats()["rates"] == {}
    assert serves(client)


def test_inline_payloads_of_wrong_sizes_give_their_slots_back(client: RemoteClient, raw: RawClient) -> None:
    raw.ask(m.Hello(m.PROTOCOL_VERSION, "s", "bad"))
    raw.ask(m.Register(SPACE))
    pieces = tuple(Piece(bytes([number]) * 32, b"p" * 32, 64 * number, 64) for number in range(4))
    hashes = tuple(piece.chunk_hash for piece in pieces)
    reply = raw.ask(m.Reserve(SPACE.fingerprint, 0, pieces))
    assert isinstance(reply, m.Reserved)
    size = SPACE.layout.payload_bytes(64)
    raw.say(encode(3, m.Commit(0, hashes), [b"a" * size, b"too short", b"c" * (size + 1)]))
    raw.ask(m.Ping())
    assert client.keys() == [SPACE.key(hashes[0], 0)]
    l1 = client.stats()["l1"]
    assert (l1["entries"], l1["reservations"]) == (1, 0)


def test_a_client_that_never_reads_does_not_stop_the_server(
    server: ForkedServer, client: RemoteClient
) -> None:
    asked = prompt(40 * 64, seed=1)
    store(client, asked)
    with contextlib.closing(RawClient(server.endpoint)) as greedy:
        greedy.ask(m.Hello(m.PROTOCOL_VERSION, "s", "greedy"))
        greedy.ask(m.Register(asked.namespace))
        hashes = tuple(piece.chunk_hash for piece in asked.pieces)
        for number in range(50):
            greedy.say(encode(number, m.Fetch("r", 0, asked.namespace.fingerprint, hashes)))
        assert look(client, "mine", asked) == len(asked)
        assert client.num_failures == 0


def test_nothing_else_in_the_log(server: ForkedServer, client: RemoteClient, raw: RawClient) -> None:
    for message in BAD:
        raw.ask(m.Hello(m.PROTOCOL_VERSION, "s", "bad"))
        raw.ask(m.Register(SPACE))
        raw.ask(message)
    assert "Traceback" not in server.log_path.read_text()
