"""One server and the connections to it."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from kvstrata.errors import TierError, TierFull, TierUnavailable
from kvstrata.tiers.connections import Connections
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

    def deadline(self) -> float:
        """When a batch that begins now must have ended (monotonic), in however many requests."""
        return time.monotonic() + self.connect_timeout_seconds + self.timeout_seconds


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
        self._connections = Connections(self.name, limits.num_connections, self._connect)
        self._lock = threading.Lock()
        self._introduced = False

    def acquire(self, timeout_seconds: float) -> Connection:
        """A connection for one thread until it is given to :meth:`release`; its deadline is not started.

        Raises:
            Busy: all connections stay in use.
            TierUnavailable: no new one can be made.
        """
        connection, _ = self._connections.acquire(timeout_seconds)
        return connection

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next operation if it is in order, else close it."""
        if not connection.idle:
            connection.close()
        self._connections.release(connection)

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
        self._connections.drop_idle()

    def close(self) -> None:
        """Close idle connections now and those in use when they are given back. Idempotent."""
        self._connections.close()
