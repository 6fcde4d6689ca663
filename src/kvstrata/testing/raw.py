"""What a transport does without us: the loops that a tier's throughput is compared with.

``raw_loop(url, ...)`` writes and reads frames with the fewest operations that the transport allows: one after
the other on one connection, from and to memory that is reused.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import msgspec


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

    ``url``: ``redis://`` or ``unix://``, with a password or without, or ``file://`` for a directory.
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
    if parts.scheme in ("redis", "unix"):
        return RawRedis(url)
    raise ValueError(f"no raw loop for {parts.scheme}://")


def _rate(move: Callable[[int, memoryview], None], frames: list[memoryview]) -> float:
    started = time.perf_counter()
    for number, frame in enumerate(frames):
        move(number, frame)
    return sum(map(len, frames)) / (time.perf_counter() - started)


class RawRedis:
    """SET and GET over one socket; replies are trusted to have the form that they should have."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            self._sock = socket.socket(socket.AF_UNIX)
            self._sock.connect(unquote(parts.path))
        else:
            self._sock = socket.create_connection((parts.hostname or "localhost", parts.port or 6379))
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(30)
        if parts.password:
            login = [part for part in (parts.username, parts.password) if part]
            self._ask("AUTH", *map(unquote, login))

    def _ask(self, *arguments: str) -> None:
        self._sock.sendall("".join([f"*{len(arguments)}\r\n", *map(_bulk, arguments)]).encode())
        reply = self._sock.recv(64)
        if not reply.startswith((b"+", b":")):
            raise OSError("the server refused a command of the raw loop")

    def write(self, number: int, frame: memoryview) -> None:
        key = _bulk(f"raw{number}")
        self._sock.sendall(f"*3\r\n$3\r\nSET\r\n{key}${len(frame)}\r\n".encode())
        self._sock.sendall(frame)
        self._sock.sendall(b"\r\n")
        if self._sock.recv(64) != b"+OK\r\n":
            raise OSError("the server refused a value of the raw loop")

    def read(self, number: int, frame: memoryview) -> None:
        self._sock.sendall(f"*2\r\n$3\r\nGET\r\n{_bulk(f'raw{number}')}".encode())
        head = self._sock.recv(len(f"${len(frame)}\r\n"))
        if head != b"$%d\r\n" % len(frame):
            raise OSError("the server lost a value of the raw loop")
        done = 0
        while done < len(frame):
            count = self._sock.recv_into(frame[done:])
            if count == 0:
                raise ConnectionResetError("the server closed the connection")
            done += count
        self._sock.recv(2)

    def close(self, num_frames: int) -> None:
        self._ask("DEL", *(f"raw{number}" for number in range(num_frames)))
        self._sock.close()


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
