"""The kvstrata server: one thread that answers clients, over a core whose I/O has threads of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from kvstrata.__about__ import __version__
from kvstrata.cache.build import build_cache
from kvstrata.config import Settings
from kvstrata.errors import ConfigError, ProtocolError
from kvstrata.memory.handover import PoolServer
from kvstrata.memory.region import SharedRegion
from kvstrata.metrics import Metrics
from kvstrata.operations import Operations
from kvstrata.protocol import messages as m
from kvstrata.protocol.framing import MAX_MESSAGE_BYTES, decode_request, encode
from kvstrata.server.dispatch import Dispatcher
from kvstrata.server.sessions import Sessions
from kvstrata.tracing import open_tracer

logger = logging.getLogger(__name__)

_POLL_MS = 1000
_STALLED_SECONDS = 30.0
"""The server's thread turns every second; when it has not for so long, it hangs."""
_MAX_BURST = 64
"""Requests that are answered before other descriptors are looked at."""


@dataclass
class _Clear:
    """A clear that somebody waits for."""

    identity: bytes
    sequence: int
    steps: Iterator[int]
    num_dropped: int = 0


class Server:
    """Startup, serve, shutdown.

    Threading: ``serve`` runs on one thread; ``stop`` may be called from any, also from a signal handler.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        endpoint: str,
        pool_socket: str,
        announce_chunk_size: bool = True,
        watch_pid: int | None = None,
    ) -> None:
        """Take memory, open the tiers and listen.

        Args:
            settings: the whole tree; of it the server uses what concerns the cache.
            endpoint: a ZMQ endpoint, "tcp://127.0.0.1:5555" or "ipc:///path".
            pool_socket: path of the unix socket that hands the pool over.
            announce_chunk_size: whether clients without a chunk size of their own take that of ``settings``.
            watch_pid: end when this process ends.

        Raises:
            ConfigError, PoolError: as the parts say.
        """
        self._counters = Metrics()
        self.started_at = time.time()
        self._turned_at = time.monotonic()
        self._stopping = threading.Event()
        self._clears: deque[_Clear] = deque()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_wakeup)
            self._region = SharedRegion.create(settings.max_local_cpu_bytes, settings.shm_dir)
            stack.callback(self._region.close)
            tracer = open_tracer("server", enabled=settings.tracing)
            if tracer is not None:
                stack.callback(tracer.close)
            self.cache = build_cache(settings, self._region, self._counters, tracer)
            stack.callback(self.cache.close)
            self.operations = Operations(self.cache, settings)
            stack.callback(self.operations.close)
            self._sessions = Sessions(self.cache, time.monotonic)
            stack.callback(self._sessions.close)
            self._pool_server = PoolServer(pool_socket, self._region, self.cache.pool_id)
            stack.callback(self._pool_server.close)
            self._watched = None if watch_pid is None else _pidfd(watch_pid)
            if self._watched is not None:
                stack.callback(os.close, self._watched)
            self._context = zmq.Context()
            stack.callback(self._context.destroy, linger=0)
            self._router = self._bind(endpoint)
            chunk_size = settings.chunk_size if announce_chunk_size else None
            self._dispatcher = Dispatcher(self.cache, self._sessions, pool_socket, chunk_size)
            self._poller = self._make_poller()
            self._region.populate()
            self._cleanup = stack.pop_all()
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)

    def _bind(self, endpoint: str) -> zmq.Socket[bytes]:
        router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.MAXMSGSIZE, max(MAX_MESSAGE_BYTES, 1 << 30))
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        router.setsockopt(zmq.IPV6, "[" in endpoint)
        try:
            router.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot listen on {endpoint}: {_advice(error)}") from error
        return router

    def _make_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._pool_server.fileno(), zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        if self._watched is not None:
            poller.register(self._watched, zmq.POLLIN)
        return poller

    # Serve

    def serve(self) -> None:
        """Answer clients until ``stop``, or until the watched process ends."""
        size_gib = self._region.size_bytes / 2**30
        logger.info("kvstrata %s serves on %s, %.1f GiB of L1", __version__, self.endpoint, size_gib)
        while not self._stopping.is_set():
            for ready, _ in self._poller.poll(0 if self._clears else _POLL_MS):
                self._serve_ready(ready)
            self._clear_on()
            self._sessions.expire()
            self.operations.expire()
            self._turned_at = time.monotonic()
        while self._clears:
            self._clear_on()

    def stop(self) -> None:
        """Let ``serve`` return at once."""
        self._stopping.set()
        if self._wakeup >= 0:
            os.eventfd_write(self._wakeup, 1)

    def _close_wakeup(self) -> None:
        fd, self._wakeup = self._wakeup, -1
        os.close(fd)

    def _serve_ready(self, ready: zmq.Socket[bytes] | int) -> None:
        if ready is self._router:
            self._answer_waiting()
        elif ready == self._pool_server.fileno():
            connection = self._pool_server.serve_one()
            if connection is not None:
                self._sessions.connected(connection)
                self._poller.register(connection.fileno(), zmq.POLLIN)
        elif ready == self._watched:
            logger.info("the process that started this server has ended")
            self.stop()
        elif isinstance(ready, int) and ready != self._wakeup:
            # Unregister first: a closed connection's number may be reused at once.
            self._poller.unregister(ready)
            if self._sessions.readable(ready):
                self._poller.register(ready, zmq.POLLIN)

    def _answer_waiting(self) -> None:
        for _ in range(_MAX_BURST):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            identity = frames[0].bytes
            self._answer(identity, [frame.buffer for frame in frames[1:]])

    def _answer(self, identity: bytes, parts: Sequence[memoryview]) -> None:
        try:
            sequence, request, payloads = decode_request(parts)
        except ProtocolError as error:
            logger.warning("a client sent something else than a request: %s", error)
            sequence = int.from_bytes(parts[0][:8], "little") if parts else 0
            self._send(identity, sequence, m.Refused(str(error)), ())
            return
        try:
            reply, reply_payloads = self._dispatcher.dispatch(identity, request, payloads)
        except ProtocolError as error:
            logger.warning("refused a client's %s: %s", type(request).__name__, error)
            reply, reply_payloads = m.Refused(str(error)), ()
        except Exception:  # one request must not end the cache of everybody else
            logger.exception("a client's %s failed", type(request).__name__)
            reply, reply_payloads = m.Refused("internal error"), ()
        if isinstance(reply, Iterator):
            self._clears.append(_Clear(identity, sequence, reply))
        elif reply is not None and isinstance(request, m.ANSWERED):
            self._send(identity, sequence, reply, reply_payloads)

    def _clear_on(self) -> None:
        """One step of the clear that was asked for first."""
        if not self._clears:
            return
        clear = self._clears[0]
        reply: m.Reply
        try:
            for count in clear.steps:
                clear.num_dropped += count
                return
            reply = m.Cleared(clear.num_dropped)
        except Exception:  # as with any request
            logger.exception("a client's Clear failed")
            reply = m.Refused("internal error")
        self._clears.popleft()
        self._send(clear.identity, clear.sequence, reply, ())

    def _send(
        self, identity: bytes, sequence: int, reply: m.Reply, payloads: Sequence[memoryview | bytes]
    ) -> None:
        # A client that does not read has lost its reply, not the server its time.
        with contextlib.suppress(zmq.Again):
            self._router.send_multipart([identity, *encode(sequence, reply, payloads)], zmq.NOBLOCK)

    # Operations: what the HTTP API asks, from its own thread

    def stats(self) -> dict[str, Any]:
        """A snapshot of all figures."""
        uptime_seconds = time.time() - self.started_at
        return self.cache.stats() | {"sessions": len(self._sessions), "uptime_seconds": uptime_seconds}

    def metrics(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        self._counters.update_gauges(self.cache.l1_stats(), len(self._sessions), self.cache.tiers)
        self._counters.update_quotas(self.cache.quotas.report())
        pins = self.operations.pins.list()
        self._counters.pins.set(len(pins))
        self._counters.pinned_bytes.set(sum(pin.payload_bytes for pin in pins))
        self._counters.stores_frozen.set(self.cache.stores_frozen)
        return self._counters.render()

    def health(self) -> dict[str, Any]:
        """Healthy as long as it answers clients; a tier that is down is shown, and gone on without."""
        tiers = {tier.name: tier.state for tier in self.cache.tiers}
        stalled = time.monotonic() - self._turned_at > _STALLED_SECONDS
        status = "stopping" if self._stopping.is_set() else "stalled" if stalled else "ok"
        return {"status": status, "version": __version__, "tiers": tiers}

    def close(self) -> None:
        """Write what is queued within the time, then give everything back. Idempotent."""
        self._cleanup.close()


def _advice(error: zmq.ZMQError) -> str:
    """Why an endpoint cannot be listened on, and what to do."""
    match error.errno:
        case errno.EADDRINUSE:
            return "it is in use, perhaps by another kvstrata server; choose another port (--port)"
        case errno.ENODEV | errno.EADDRNOTAVAIL:
            return "this machine has no such address; choose one of its own (--host), 0.0.0.0 is all of them"
        case _:
            return str(error.strerror)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise ConfigError(f"process {pid}, which this server was to serve, has ended: {error}") from error
