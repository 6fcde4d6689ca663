"""Bytes from and to one client, on an event loop, without a copy where there is no TLS."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from kvstrata.types import Buffer

INPUT_BYTES = 4096
"""What is read ahead of need: heads and keys. Values go to their slot directly. Each connection has so many."""
_TLS_PIECE_BYTES = 256 << 10
"""Encrypted at once; other clients are served in between."""
_DROP_BYTES = 64 << 10
_MAX_PARTS = 512
"""Buffers per sendmsg; the system allows 1024."""


class Stream(Protocol):
    """Cancelling a call leaves the stream unusable but for ``close``."""

    async def receive(self, view: memoryview) -> int:
        """Put what has come, at least a byte, to the start of ``view``; 0 at the end."""

    async def receive_all(self, view: memoryview) -> bool:
        """Fill ``view``; False when the end comes before that."""

    async def send(self, parts: Sequence[Buffer]) -> None:
        """Send all; the memory is the caller's again afterwards."""

    def close(self) -> None:
        """Idempotent."""


class PlainStream:
    """A socket without TLS. Values of megabytes pass in few calls, so what a call costs besides copying counts."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def receive(self, view: memoryview) -> int:
        while True:
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)

    async def receive_all(self, view: memoryview) -> bool:
        done, size = 0, len(view)
        while done < size:
            try:
                count = self._sock.recv_into(view[done:])
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            if count == 0:
                return False
            done += count
        return True

    async def send(self, parts: Sequence[Buffer]) -> None:
        views = [memoryview(part) for part in parts if len(part)]
        first = 0
        while first < len(views):
            try:
                sent = self._sock.sendmsg(views[first : first + _MAX_PARTS])
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
                continue
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        waiting = self._loop.create_future()
        fd = self._sock.fileno()  # given the socket, selectors would print its addresses each time
        add(fd, _wake, waiting)
        try:
            await waiting
        finally:
            remove(fd)

    def close(self) -> None:
        self._sock.close()


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class TLSStream:
    """A TLS connection of asyncio's, which copies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self, view: memoryview) -> int:
        data = await self._reader.read(len(view))
        view[: len(data)] = data
        return len(data)

    async def receive_all(self, view: memoryview) -> bool:
        done = 0
        while done < len(view):
            count = await self.receive(view[done:])
            if count == 0:
                return False
            done += count
        return True

    async def send(self, parts: Sequence[Buffer]) -> None:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), _TLS_PIECE_BYTES):
                self._writer.write(view[start : start + _TLS_PIECE_BYTES])
                await self._writer.drain()

    def close(self) -> None:
        # Without a closing handshake: a client that does not answer it would keep the connection.
        self._writer.transport.abort()


class Input:
    """Messages out of a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._view = memoryview(bytearray(INPUT_BYTES))
        self._at = 0
        self._end = 0

    async def wait(self) -> bool:
        """Wait for the first byte of a message; False when there will be none."""
        if self._at == self._end:
            self._at, self._end = 0, await self._stream.receive(self._view)
        return self._end > 0

    async def take(self, size: int) -> bytes:
        """The next ``size`` bytes; the caller has bounded them."""
        if size <= self._end - self._at:
            self._at += size
            return bytes(self._view[self._at - size : self._at])
        data = bytearray(size)
        with memoryview(data) as view:
            await self.into(view)
        return bytes(data)

    async def into(self, view: memoryview) -> None:
        """Fill ``view``; what has not been received yet goes there directly."""
        done = self._take_buffered(view)
        if len(view) - done >= INPUT_BYTES:
            if not await self._stream.receive_all(view[done:]):
                raise ConnectionResetError("the client hung up within a message")
            return
        while done < len(view):  # the rest of a head; what follows it is taken along
            self._at, self._end = 0, await self._stream.receive(self._view)
            if self._end == 0:
                raise ConnectionResetError("the client hung up within a message")
            done += self._take_buffered(view[done:])

    def _take_buffered(self, view: memoryview) -> int:
        count = min(len(view), self._end - self._at)
        view[:count] = self._view[self._at : self._at + count]
        self._at += count
        return count

    async def drop(self, size: int) -> None:
        """Receive ``size`` bytes and forget them."""
        scratch = memoryview(bytearray(min(size, _DROP_BYTES)))
        while size:
            part = scratch[: min(size, len(scratch))]
            await self.into(part)
            size -= len(part)
