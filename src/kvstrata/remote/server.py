"""The remote server: listen, accept, drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import ssl
from typing import cast

from kvstrata.errors import ConfigError
from kvstrata.remote.service import RemoteOptions, Service
from kvstrata.remote.session import Session
from kvstrata.remote.stream import PlainStream, Stream, TLSStream

log = logging.getLogger(__name__)

_BACKLOG = 1024
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_SECONDS = 0.2
_SWEEP_SECONDS = 0.25
_SOCKET_BYTES = 512 << 10
"""Measured from 256 KiB to 4 MiB without a difference; there may be thousands of them."""


class RemoteServer:
    """One listening socket and a task per client, on one event loop. Made and used on that loop."""

    def __init__(self, options: RemoteOptions) -> None:
        """Take memory, open the disk, read the certificate and listen.

        Raises:
            ConfigError: one of these is not possible.
        """
        self.options = options
        self._context = _tls_context(options)
        self._listener = _listen(options.host, options.port)
        self.port: int = self._listener.getsockname()[1]
        try:
            self.service = Service(options)
        except BaseException:
            self._listener.close()
            raise
        self._sessions: dict[asyncio.Task[None], Session | None] = {}
        self._stopping = asyncio.Event()

    @property
    def url(self) -> str:
        """Where clients find it, without the token."""
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return f"{'lms' if self._context else 'lm'}://{host}:{self.port}"

    def stop(self) -> None:
        """Let ``serve`` drain and return."""
        self._stopping.set()

    async def serve(self) -> None:
        """Serve until ``stop``; then complete what is in flight, write to disk, and give everything back."""
        raise_descriptor_limit()
        accepting = asyncio.create_task(self._accept())
        sweeping = asyncio.create_task(self._sweep())
        try:
            await self._stopping.wait()
        finally:
            accepting.cancel()
            sweeping.cancel()
            await asyncio.gather(accepting, sweeping, return_exceptions=True)
            self._listener.close()
            await self._drain()
            self.service.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    log.warning("cannot accept connections now: %s", error.strerror)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if len(self._sessions) >= self.options.max_connections:
                sock.close()
                self.service.complain(
                    f"more than {self.options.max_connections} connections; one was refused"
                )
                continue
            task = asyncio.create_task(self._talk(sock, f"{address[0]}:{address[1]}"))
            self._sessions[task] = None
            self.service.counters.connections = len(self._sessions)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sessions.pop(task, None)
        self.service.counters.connections = len(self._sessions)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("serving a client failed", exc_info=error)

    async def _talk(self, sock: socket.socket, peer: str) -> None:
        try:
            _set_up(sock)
            stream = PlainStream(sock) if self._context is None else await self._shake_hands(sock)
        except OSError as error:
            sock.close()
            self.service.complain(f"{peer}: no connection: {error}")
            return
        except BaseException:
            sock.close()
            raise
        session = Session(self.service, stream, peer)
        self._sessions[cast("asyncio.Task[None]", asyncio.current_task())] = session
        await session.run()

    async def _shake_hands(self, sock: socket.socket) -> Stream:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=self._context,
            ssl_handshake_timeout=self.options.message_seconds,
        )
        return TLSStream(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    async def _sweep(self) -> None:
        """Drop what has expired, and hang up on clients that are late."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.service.expire()
            for task, session in self._sessions.items():
                if session is not None and session.is_late():
                    task.cancel()

    async def _drain(self) -> None:
        """Idle clients are hung up on; those in the middle of a message get the time to complete it."""
        self.service.draining = True
        await asyncio.sleep(0.01)  # a message that has come already counts as begun
        for task, session in list(self._sessions.items()):
            if session is None or not session.busy:
                task.cancel()
        if self._sessions:
            _, late = await asyncio.wait(list(self._sessions), timeout=self.options.drain_seconds)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d clients did not complete their messages in time", len(late))
                await asyncio.wait(late)
        if self.service.shelf is not None:
            lost = await self.service.shelf.flush(self.options.drain_seconds)
            if lost:
                log.warning("%d entries could not be written to disk in time", lost)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Before listen: accepted sockets inherit it, and the window's scale is fixed by then.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return sock


def _set_up(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)


def _tls_context(options: RemoteOptions) -> ssl.SSLContext | None:
    if options.tls_cert is None and options.tls_key is None:
        return None
    if options.tls_cert is None:
        raise ConfigError("--tls-key without --tls-cert")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"the certificate {options.tls_cert!r} or its key cannot be used: {error}"
        ) from error
    return context


def raise_descriptor_limit() -> None:
    """Every client is a descriptor; the usual soft limit of 1,024 is for programs that use ``select``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
