"""What a transport does without us: the loops that a tier's throughput is compared with.

``raw_loop(url, ...)`` writes and reads frames with the fewest operations that the transport allows: one after
the other on one connection, from and to memory that is reused.
"""

from __future__ import annotations

import http
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from kvstrata.testing import raw_socket
from kvstrata.tiers.redis.deployment import open_topology
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.server import Limits
from kvstrata.tiers.redis.url import SCHEMES, parse_url

_PATIENCE_SECONDS = 30.0


class RawRates(msgspec.Struct, frozen=True):
    """Bytes per second of each round, in order."""

    write: tuple[float, ...]
    read: tuple[float, ...]


class RawTransport(Protocol):
    """Frames by number."""

    def write(self, number: int, frame: memoryview) -> None: ...

    def read(self, number: int, frame: memoryview) -> None: ...

    def close(self, num_frames: int) -> None:
        """Remove frames 0 to ``num_frames`` - 1 and disconnect."""


def raw_loop(url: str, *, frame_bytes: int, num_frames: int = 4, num_rounds: int = 5) -> RawRates:
    """Write and read ``num_frames`` frames of ``frame_bytes`` per round, after one round of warm-up.

    ``url``: any of the Redis family (a frame goes to the server that has its name), ``s3://``, Mooncake,
    InfiniStore, ``file://`` for a directory, or ``lm://`` for a bare server on a TCP port of this host (that in the
    URL is not used: it is what is compared).
    What was written is removed.

    Raises:
        ValueError: another kind of URL.
        OSError: the transport failed.
    """
    transport = open_raw(url)
    frames = [memoryview(bytearray(os.urandom(frame_bytes))) for _ in range(num_frames)]
    writes, reads = [], []
    try:
        for _ in range(num_rounds + 1):
            writes.append(_rate(transport.write, frames))
            reads.append(_rate(transport.read, frames))
    finally:
        transport.close(num_frames)
    return RawRates(tuple(writes[1:]), tuple(reads[1:]))


def open_raw(url: str) -> RawTransport:
    """The transport behind a URL of :func:`raw_loop`, to compare with round by round on a busy machine."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return RawFiles(Path(unquote(parts.path)))
    if parts.scheme == "unix" or parts.scheme in SCHEMES:
        return RawRedis(url)
    if parts.scheme == "lm":
        return RawSocket()
    if parts.scheme == "s3":
        return RawS3(url)
    if parts.scheme in ("mooncakestore", "infinistore"):
        from kvstrata.testing.raw_stores import RawInfiniStore, RawMooncake  # noqa: PLC0415 - seldom wanted

        return RawMooncake(url) if parts.scheme == "mooncakestore" else RawInfiniStore(url)
    raise ValueError(f"no raw loop for {parts.scheme}://")


def _rate(move: Callable[[int, memoryview], None], frames: list[memoryview]) -> float:
    started = time.perf_counter()
    for number, frame in enumerate(frames):
        move(number, frame)
    return sum(map(len, frames)) / (time.perf_counter() - started)


class RawRedis:
    """SET and GET, each over one socket to the server that has the name; replies are trusted to have the form that
    they should have."""

    def __init__(self, url: str) -> None:
        deployment = parse_url(url)
        self._context = deployment.data.tls_context()
        limits = Limits(
            num_connections=1, connect_timeout_seconds=_PATIENCE_SECONDS, timeout_seconds=_PATIENCE_SECONDS
        )
        self._topology = open_topology(deployment, limits)
        self._sockets: dict[str, socket.socket] = {}
        self._by_number: dict[int, socket.socket] = {}

    def _socket(self, number: int) -> socket.socket:
        """The socket to the server of a frame."""
        sock = self._by_number.get(number)
        if sock is None:
            server = self._topology.route([f"raw{number}".encode()], is_write=True)[0].server
            if server is None:
                raise OSError("nobody serves a name of the raw loop")
            sock = self._sockets.get(server.name) or self._connect(server.endpoint)
            self._sockets[server.name] = self._by_number[number] = sock
        return sock

    def _connect(self, endpoint: Endpoint) -> socket.socket:
        sock = endpoint.connect(self._context, _PATIENCE_SECONDS)
        sock.settimeout(_PATIENCE_SECONDS)
        if endpoint.password:
            _ask(sock, "AUTH", *filter(None, (endpoint.username, endpoint.password)))
        if endpoint.db:
            _ask(sock, "SELECT", str(endpoint.db))
        return sock

    def write(self, number: int, frame: memoryview) -> None:
        sock = self._socket(number)
        key = _bulk(f"raw{number}")
        sock.sendall(f"*3\r\n$3\r\nSET\r\n{key}${len(frame)}\r\n".encode())
        sock.sendall(frame)
        sock.sendall(b"\r\n")
        if sock.recv(64) != b"+OK\r\n":
            raise OSError("the server refused a value of the raw loop")

    def read(self, number: int, frame: memoryview) -> None:
        sock = self._socket(number)
        sock.sendall(f"*2\r\n$3\r\nGET\r\n{_bulk(f'raw{number}')}".encode())
        head = sock.recv(len(f"${len(frame)}\r\n"))
        if head != b"$%d\r\n" % len(frame):
            raise OSError("the server lost a value of the raw loop")
        done = 0
        while done < len(frame):
            count = sock.recv_into(frame[done:])
            if count == 0:
                raise ConnectionResetError("the server closed the connection")
            done += count
        sock.recv(2)

    def close(self, num_frames: int) -> None:
        for number in range(num_frames):
            _ask(self._socket(number), "DEL", f"raw{number}")
        for sock in self._sockets.values():
            sock.close()
        self._topology.close()


class RawSocket:
    """Frames to and from a process that does nothing but keep them (:mod:`kvstrata.testing.raw_socket`)."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", raw_socket.__file__]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603 - our own program
        assert self._process.stdout is not None
        with self._process.stdout as output:
            self._sock = socket.create_connection(("127.0.0.1", int(output.readline())))
        raw_socket.tune(self._sock)

    def write(self, number: int, frame: memoryview) -> None:
        self._sock.sendall(raw_socket.REQUEST.pack(b"w", number, len(frame)))
        self._sock.sendall(frame)
        if self._sock.recv(1) != b"+":
            raise OSError("the server of the raw loop has ended")

    def read(self, number: int, frame: memoryview) -> None:
        self._sock.sendall(raw_socket.REQUEST.pack(b"r", number, len(frame)))
        if not raw_socket.receive(self._sock, frame):
            raise ConnectionResetError("the server of the raw loop has ended")

    def close(self, num_frames: int) -> None:  # noqa: ARG002 - the frames go with the process
        self._sock.close()
        self._process.wait()


class RawS3:
    """PUT and GET over one HTTP connection, to addresses that were signed before: no hashing, no client library."""

    def __init__(self, url: str) -> None:
        import obstore  # noqa: PLC0415 - the extra s3

        from kvstrata.tiers.s3.location import parse_url  # noqa: PLC0415
        from kvstrata.tiers.s3.tier import S3Options, open_store  # noqa: PLC0415

        self._obstore = obstore
        self._location = parse_url(url)
        self._store = open_store(self._location, S3Options(url=url))
        self._addresses: dict[tuple[str, int], str] = {}
        self._connection: http.client.HTTPConnection | None = None

    def _name(self, number: int) -> str:
        return f"{self._location.prefix}/raw{number}".lstrip("/")

    def _ask(
        self, method: Literal["PUT", "GET"], number: int, body: memoryview | None
    ) -> http.client.HTTPResponse:
        address = self._addresses.get((method, number))
        if address is None:
            address = self._obstore.sign(self._store, method, self._name(number), timedelta(hours=1))
            self._addresses[method, number] = address
        parts = urlsplit(address)
        if self._connection is None:
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._connection = kind(parts.netloc, timeout=30)
        length = {} if body is None else {"Content-Length": str(len(body))}
        self._connection.request(method, f"{parts.path}?{parts.query}", body, length)
        response = self._connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise OSError(f"the server answered {response.status} to a request of the raw loop")
        return response

    def write(self, number: int, frame: memoryview) -> None:
        self._ask("PUT", number, frame).read()

    def read(self, number: int, frame: memoryview) -> None:
        response = self._ask("GET", number, None)
        done = 0
        while done < len(frame):
            count = response.readinto(frame[done:])
            if count == 0:
                raise ConnectionResetError("the server closed the connection")
            done += count
        response.read()

    def close(self, num_frames: int) -> None:
        self._obstore.delete(self._store, [self._name(number) for number in range(num_frames)])
        if self._connection is not None:
            self._connection.close()


class RawFiles:
    """A file per frame, written to a new name, renamed, and read back."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, number: int) -> Path:
        return self._directory / f"raw{number}"

    def write(self, number: int, frame: memoryview) -> None:
        path = self._path(number).with_suffix(".new")
        with path.open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, len(frame))  # ext4 replaces files 8 times slower without
            file.write(frame)
        path.rename(self._path(number))

    def read(self, number: int, frame: memoryview) -> None:
        with self._path(number).open("rb", buffering=0) as file:
            if file.readinto(frame) != len(frame):
                raise OSError("a file of the raw loop is short")

    def close(self, num_frames: int) -> None:
        for number in range(num_frames):
            self._path(number).unlink(missing_ok=True)


def _bulk(text: str) -> str:
    return f"${len(text)}\r\n{text}\r\n"


def _ask(sock: socket.socket, *arguments: str) -> None:
    words = [b"$%d\r\n%b\r\n" % (len(word.encode()), word.encode()) for word in arguments]
    sock.sendall(b"*%d\r\n" % len(words) + b"".join(words))
    if not sock.recv(64).startswith((b"+", b":")):
        raise OSError("the server refused a command of the raw loop")
