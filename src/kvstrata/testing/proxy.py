"""A TCP proxy that delays, throttles, cuts, half-closes, corrupts, holds and refuses, as told while it runs.

    with Proxy(("127.0.0.1", 6379)) as proxy:
        tier_url = f"redis://127.0.0.1:{proxy.port}"
        proxy.link = Link(to_server=Flow(delay_seconds=0.0025), to_client=Flow(delay_seconds=0.0025))
        proxy.link = BLACK_HOLE   # accepts and never answers
        proxy.link = Link()       # in order again

One thread, loopback only. Without faults it passed on 560 to 700 MB/s in one direction on a busy machine with two
cores (``python -m kvstrata.testing.proxy``).
"""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import msgspec

from kvstrata.testing.guard import die_with_parent

_PIECE_BYTES = 256 << 10
"""Received at once."""
_BUFFER_BYTES = 8 << 20
"""Held for one direction of a connection; then it is no longer read from."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes ``close`` send RST."""
_CONNECT_SECONDS = 1.0
_BURST_SECONDS = 0.02
"""What a bandwidth allows in this time may be sent at once after a pause: so long may the thread be late."""

Rewrite = Callable[[bytes], bytes]


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to bytes in one direction. Counts are per connection, from its beginning."""

    delay_seconds: float = 0.0
    """Added latency; bandwidth stays."""
    bytes_per_second: float | None = None
    """Bandwidth of each connection, or of all together."""
    shared: bool = False
    """All connections together have the bandwidth, as on a real link. They take turns."""
    held: bool = False
    """Nothing gets through. What was sent meanwhile arrives when this ends, as after a lost packet."""
    reset_after_bytes: int | None = None
    """Both sides get RST once so many bytes got through."""
    end_after_bytes: int | None = None
    """Half-close: the receiver gets FIN after so many bytes; the other direction goes on."""
    flip_every_bytes: int | None = None
    """One bit is inverted in every so many bytes."""
    rewrite: Rewrite | None = None
    """Called with each piece as it was received (of any size); what it returns is passed on instead."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the way between clients and the server."""

    to_server: Flow = Flow()
    to_client: Flow = Flow()
    refuses: bool = False
    """Connections are refused, and those that exist are reset."""


BLACK_HOLE = Link(to_server=Flow(held=True), to_client=Flow(held=True))
"""Connections are accepted; nothing is ever answered."""
REFUSING = Link(refuses=True)


def slow_link(
    round_trip_seconds: float, bytes_per_second: float | None = None, *, shared: bool = False
) -> Link:
    """A link whose latency is half of ``round_trip_seconds`` each way."""
    flow = Flow(delay_seconds=round_trip_seconds / 2, bytes_per_second=bytes_per_second, shared=shared)
    return Link(to_server=flow, to_client=flow)


class _Pace:
    """When a bandwidth allows the next byte."""

    def __init__(self) -> None:
        self.send_at = 0.0

    def sent(self, num_bytes: int, bytes_per_second: float, now: float) -> None:
        self.send_at = max(self.send_at, now - _BURST_SECONDS) + num_bytes / bytes_per_second


class _Pipe:
    """One direction of a connection: bytes on their way from ``source`` to ``sink``."""

    def __init__(self, source: socket.socket, sink: socket.socket, shared_pace: _Pace) -> None:
        self.source = source
        self.sink = sink
        self.is_over = False
        """FIN has been passed on."""
        self._queue: collections.deque[tuple[float, memoryview]] = collections.deque()
        self._queued_bytes = 0
        self._num_received = 0
        self._num_sent = 0
        self._source_ended = False
        self._own_pace = _Pace()
        self._shared_pace = shared_pace

    def wants_to_read(self) -> bool:
        return not self._source_ended and self._queued_bytes < _BUFFER_BYTES

    def receive(self, flow: Flow, now: float) -> None:
        """Take what has come. Raises OSError when the source was reset."""
        piece = self.source.recv(_PIECE_BYTES)
        if not piece:
            self._source_ended = True
        if self.is_over or not piece:
            return
        if flow.flip_every_bytes:
            piece = _flipped(piece, self._num_received, flow.flip_every_bytes)
        self._num_received += len(piece)
        if flow.rewrite is not None:
            piece = flow.rewrite(piece)
        self._queue.append((now + flow.delay_seconds, memoryview(piece)))
        self._queued_bytes += len(piece)

    def due_at(self, flow: Flow) -> float | None:
        """When something can be sent, if the sink takes it; None while there is nothing to wait for."""
        if flow.held or self.is_over:
            return None
        if self._queue:
            return max(self._queue[0][0], self._pace(flow).send_at)
        return 0.0 if self._source_ended else None

    def _pace(self, flow: Flow) -> _Pace:
        return self._shared_pace if flow.shared else self._own_pace

    def send(self, flow: Flow, now: float) -> bool:
        """Pass on what is due; whether the connection is to be reset. Raises OSError when the sink is gone."""
        pace = self._pace(flow)
        while self._queue and self._queue[0][0] <= now >= pace.send_at:
            due, piece = self._queue.popleft()
            allowed = self._allowed(flow, len(piece))
            try:
                sent = self.sink.send(piece[:allowed]) if allowed else 0
            except BlockingIOError:
                sent, allowed = 0, -1
            self._queued_bytes -= sent
            self._num_sent += sent
            if flow.bytes_per_second:
                pace.sent(sent, flow.bytes_per_second, now)
            if sent < len(piece):
                self._queue.appendleft((due, piece[sent:]))
            if flow.reset_after_bytes is not None and self._num_sent >= flow.reset_after_bytes:
                return True
            if flow.end_after_bytes is not None and self._num_sent >= flow.end_after_bytes:
                self._end()
            if sent < allowed or allowed <= 0:
                return False
        if self._source_ended and not self._queue:
            self._end()
        return False

    def _allowed(self, flow: Flow, size: int) -> int:
        """How many bytes of the next piece may go now."""
        for limit in (flow.reset_after_bytes, flow.end_after_bytes):
            if limit is not None:
                size = min(size, max(0, limit - self._num_sent))
        if flow.bytes_per_second:
            size = min(size, max(1, int(flow.bytes_per_second / 100)))
        return size

    def _end(self) -> None:
        """Pass FIN on; what the source says from now on is dropped."""
        if not self.is_over:
            self.is_over = True
            self._queue.clear()
            self._queued_bytes = 0
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)


class _Pair:
    """One connection: the client's socket, ours to the server, and a pipe each way."""

    def __init__(self, client: socket.socket, server: socket.socket, shared: tuple[_Pace, _Pace]) -> None:
        """``shared``: of all connections, to the server and to the client."""
        self.client = client
        self.server = server
        self.up = _Pipe(client, server, shared[0])
        self.down = _Pipe(server, client, shared[1])
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pipes(self, link: Link) -> Iterator[tuple[_Pipe, Flow]]:
        yield self.up, link.to_server
        yield self.down, link.to_client

    @property
    def is_over(self) -> bool:
        return self.up.is_over and self.down.is_over

    def close(self, *, reset: bool = False) -> None:
        for sock in (self.client, self.server):
            if reset:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()


class Proxy:
    """Listens on a free port of 127.0.0.1 and passes connections on to ``server``. A context manager."""

    def __init__(self, server: tuple[str, int], link: Link | None = None) -> None:
        self._server = server
        self._link = link or Link()
        # Bound and never listening: keeps the port ours while connections are refused.
        self._holder = _bound(0)
        self.port: int = self._holder.getsockname()[1]
        self._listener: socket.socket | None = None
        self._pairs: list[_Pair] = []
        self._shared_paces = (_Pace(), _Pace())
        self._wake, self._woken = socket.socketpair()
        self._applied = threading.Condition()
        self._version = 0
        self._applied_version = 0
        self._reset_all = False
        self._closing = False
        self._listen()
        self._thread = threading.Thread(target=self._run, name=f"kvstrata-proxy-{self.port}", daemon=True)
        self._thread.start()

    # What tests call

    @property
    def address(self) -> str:
        """``127.0.0.1:PORT``."""
        return f"127.0.0.1:{self.port}"

    @property
    def link(self) -> Link:
        """The state of the way; setting it returns when it holds."""
        return self._link

    @link.setter
    def link(self, link: Link) -> None:
        self._link = link
        self._apply()

    @property
    def num_connections(self) -> int:
        """Connections that clients have now; one of a client that is gone counts until that is noticed."""
        return len(self._pairs)

    def reset(self) -> None:
        """RST to both ends of every connection; new ones are accepted."""
        self._reset_all = True
        self._apply()

    def redirect(self, server: tuple[str, int]) -> None:
        """New connections go to another server; those that exist are reset."""
        self._server = server
        self.reset()

    def close(self) -> None:
        """End all connections and the thread. Idempotent."""
        if self._thread.is_alive():
            self._closing = True
            self._wake.send(b"x")
            self._thread.join()
        for sock in (self._wake, self._woken, self._holder):
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _apply(self) -> None:
        with self._applied:
            self._version += 1
            version = self._version
            self._wake.send(b"x")
            self._applied.wait_for(lambda: self._applied_version >= version, timeout=10)

    # The thread

    def _run(self) -> None:
        while not self._closing:
            self._turn()
        for pair in self._pairs:
            pair.close(reset=True)
        self._pairs.clear()
        self._stop_listening()

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        version, link = self._version, self._link
        self._switch(link)
        with self._applied:
            self._applied_version = version
            self._applied.notify_all()
        now = time.monotonic()
        due = [(pipe, at) for pair in self._pairs for pipe, flow in pair.pipes(link)
               if (at := pipe.due_at(flow)) is not None]  # fmt: skip
        reading = [pipe.source for pair in self._pairs for pipe, flow in pair.pipes(link)
                   if not flow.held and pipe.wants_to_read()]  # fmt: skip
        writing = [pipe.sink for pipe, at in due if at <= now]
        later = min((at - now for _, at in due if at > now), default=None)
        others = [self._woken] if self._listener is None else [self._woken, self._listener]
        readable, _, _ = select.select([*others, *reading], writing, [], later)
        if self._woken in readable:
            self._woken.recv(4096)
        if self._listener in readable:
            self._accept()
        ready = set(map(id, readable))
        now = time.monotonic()
        pairs = [pair for pair in self._pairs if self._advance(pair, link, ready, now)]
        self._pairs = pairs[1:] + pairs[:1]  # another one is first when they share a bandwidth

    def _advance(self, pair: _Pair, link: Link, readable: set[int], now: float) -> bool:
        """Move what can be moved; whether the connection goes on."""
        try:
            for pipe, flow in pair.pipes(link):
                if id(pipe.source) in readable:
                    pipe.receive(flow, now)
                if not flow.held and pipe.send(flow, now):
                    pair.close(reset=True)
                    return False
        except OSError:
            pair.close(reset=True)
            return False
        if pair.is_over:
            pair.close()
            return False
        return True

    def _switch(self, link: Link) -> None:
        if link.refuses:
            self._stop_listening()
        elif self._listener is None:
            self._listen()
        if link.refuses or self._reset_all:
            self._reset_all = False
            for pair in self._pairs:
                pair.close(reset=True)
            self._pairs = []

    def _listen(self) -> None:
        self._listener = _bound(self.port)
        self._listener.listen(128)
        self._listener.setblocking(False)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:  # it has gone away
            return
        try:
            server = socket.create_connection(self._server, timeout=_CONNECT_SECONDS)
        except OSError:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        self._pairs.append(_Pair(client, server, self._shared_paces))


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _flipped(piece: bytes, offset: int, every: int) -> bytes:
    """``piece``, which begins at ``offset`` of its stream, with a bit inverted in every ``every`` bytes."""
    changed = bytearray(piece)
    for at in range(-(offset + 1) % every, len(changed), every):
        changed[at] ^= 1 << (at % 8)
    return bytes(changed)


def measure(num_bytes: int = 1 << 30) -> float:
    """Bytes per second through a proxy without faults, from a thread to this one."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        proxy = stack.enter_context(Proxy(listener.getsockname()))
        sender = stack.enter_context(socket.create_connection(("127.0.0.1", proxy.port)))
        receiver, _ = listener.accept()
        stack.enter_context(receiver)
        thread = threading.Thread(target=sender.sendall, args=(bytes(num_bytes),))
        started = time.perf_counter()
        thread.start()
        buffer = memoryview(bytearray(1 << 20))
        received = 0
        while received < num_bytes:
            received += receiver.recv_into(buffer)
        thread.join()
        return num_bytes / (time.perf_counter() - started)


@contextlib.contextmanager
def far_away(port: int, round_trip_seconds: float) -> Iterator[int]:
    """The port of a proxy with that latency in front of ``port``, in a process of its own.

    For measurements: a proxy in the process that is measured would take turns with it.
    """
    command = [sys.executable, "-m", __name__, str(port), str(round_trip_seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


def _serve(port: int, round_trip_seconds: float) -> None:
    die_with_parent()
    with Proxy(("127.0.0.1", port), slow_link(round_trip_seconds)) as proxy:
        print(proxy.port, flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _serve(int(sys.argv[1]), float(sys.argv[2]))
    else:
        print(f"{measure() / 1e6:,.0f} MB/s")  # noqa: T201
