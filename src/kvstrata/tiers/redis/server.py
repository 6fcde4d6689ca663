"""One server and the connections to it."""

from __future__ import annotations

import select
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from kvstrata.errors import TierError, TierFull, TierUnavailable
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.introduction import info_lines, introduce
from kvstrata.tiers.redis.login import log_in, masked
from kvstrata.tiers.redis.outage import Outage
from kvstrata.tiers.redis.resp import Connection, ErrorReply, command

REJOIN_CODES = frozenset({"NOAUTH", "NOPERM", "WRONGPASS", "READONLY", "MASTERDOWN"})
"""Errors after which a connection is not used again: the next may have another login or another server."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What all servers of a tier have in common."""

    num_connections: int
    """To each server."""
    connect_timeout_seconds: float
    timeout_seconds: float
    """Of one batch, once there is a connection."""
    ttl_is_set: bool = False


class Busy(TierUnavailable):
    """All connections stay in use: no fault of the server."""


class Server:
    """At most ``num_connections`` connections to one endpoint, the last used taken first. Thread-safe."""

    def __init__(
        self, endpoint: Endpoint, limits: Limits, context: ssl.SSLContext | None, *, role: str = ""
    ) -> None:
        """``context`` is the endpoint's; ``role`` what every new connection asks for (see ``log_in``)."""
        self.endpoint = endpoint
        self.name = endpoint.describe()
        self.limits = limits
        self.outage = Outage(self.name, self._probe)
        """For those who have other servers to go on with; a server that is alone is always asked."""
        self._context = context
        self._role = role
        self._free = threading.BoundedSemaphore(limits.num_connections)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._introduced = False
        self._closed = False

    def acquire(self, timeout_seconds: float) -> Connection:
        """A connection for one thread until it is given to :meth:`release`; its deadline is not started.

        Raises:
            Busy: all connections stay in use.
            TierUnavailable: no new one can be made.
        """
        deadline = time.monotonic() + timeout_seconds
        if not self._free.acquire(timeout=max(timeout_seconds, 0)):
            raise Busy(f"{self.name}: all connections are in use")
        try:
            return self._take() or self._connect(deadline - time.monotonic())
        except BaseException:
            self._free.release()
            raise

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next operation if it is in order, else close it."""
        if connection.idle and not connection.closed:
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(connection)
        else:
            keep = False
        if not keep:
            connection.close()
        self._free.release()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection whose deadline has been started.

        Raises:
            TierUnavailable: as for :meth:`acquire`.
        """
        connection = self.acquire(self.limits.timeout_seconds)
        connection.start(self.limits.timeout_seconds)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        finally:
            self.release(connection)

    def _take(self) -> Connection | None:
        """An idle connection that is still good. Bytes or an end of file while idle mean that it is not."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            poll = select.poll()
            poll.register(connection.fileno(), select.POLLIN)
            if not poll.poll(0):
                return connection
            connection.close()

    def _connect(self, timeout_seconds: float) -> Connection:
        timeout_seconds = min(timeout_seconds, self.limits.connect_timeout_seconds)
        connection = log_in(self.endpoint, self._context, timeout_seconds, role=self._role)
        try:
            self._introduce(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _introduce(self, connection: Connection) -> None:
        """Log once what the server is."""
        with self._lock:
            if self._introduced:
                return
            self._introduced = True
        try:
            introduce(connection, self.name, ttl_is_set=self.limits.ttl_is_set)
        except TierUnavailable:
            self._introduced = False
            raise

    def _probe(self) -> None:
        """Make a connection for those who come next."""
        self.drop_idle()
        self.release(self.acquire(self.limits.connect_timeout_seconds))

    def refusal(self, reply: ErrorReply) -> TierError:
        """The exception for an error reply; out of memory is :class:`TierFull`, all else is unavailable."""
        kind = TierFull if reply.code == "OOM" else TierUnavailable
        return kind(f"{self.name}: {masked(self.endpoint, reply.text)}")

    def info(self, section: str) -> dict[str, str]:
        """The fields of INFO.

        Raises:
            TierUnavailable: the server cannot be reached, or refuses.
        """
        with self.connection() as connection:
            connection.send([command(b"INFO", section.encode())])
            reply = connection.reply()
        if isinstance(reply, ErrorReply):
            raise self.refusal(reply)
        return info_lines(reply)

    def drop_idle(self) -> None:
        """Close the connections that nobody uses now."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close idle connections now and those in use when they are given back. Idempotent."""
        with self._lock:
            self._closed = True
        self.drop_idle()
