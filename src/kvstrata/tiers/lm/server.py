"""One server and the connections to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvstrata.errors import TierFull
from kvstrata.tiers.connections import Connections
from kvstrata.tiers.lm.connection import Connection
from kvstrata.tiers.lm.endpoint import Endpoint
from kvstrata.tiers.sockets import connecting

log = logging.getLogger(__name__)


class Server:
    """At most ``num_connections`` connections to one endpoint, the last used taken first. Thread-safe."""

    def __init__(
        self,
        endpoint: Endpoint,
        token: bytes,
        *,
        num_connections: int,
        connect_timeout_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self._endpoint = endpoint
        self._token = token
        self._name = endpoint.describe()
        self._context = endpoint.tls_context()
        self._connect_timeout_seconds = connect_timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._connections = Connections(self._name, num_connections, self._connect)
        self._lock = threading.Lock()
        self._said: bool | None = None

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection whose deadline has been started; kept for the next operation if nothing goes wrong.

        Raises:
            TierUnavailable: all connections stay in use, or no new one can be made.
        """
        deadline = time.monotonic() + self._timeout_seconds
        connection, is_new = self._connections.acquire(self._timeout_seconds)
        try:
            connection.start(self._timeout_seconds if is_new else deadline - time.monotonic())
            yield connection
        except TierFull:  # the exchange is complete
            raise
        except BaseException:
            connection.close()
            raise
        finally:
            self._connections.release(connection)

    def _connect(self, _left_seconds: float) -> Connection:
        """A new connection, which has a deadline of its own."""
        deadline = time.monotonic() + self._connect_timeout_seconds
        with connecting(self._name):
            sock = self._endpoint.connect(self._context, self._connect_timeout_seconds)
        connection = Connection(sock, self._name)
        try:
            connection.start(deadline - time.monotonic())
            started = time.monotonic()
            connection.introduce(self._token)
            self._introduce(connection, time.monotonic() - started)
        except BaseException:
            connection.close()
            raise
        return connection

    def _introduce(self, connection: Connection, seconds: float) -> None:
        """Log what the server is, once and when it has become another one."""
        hello = connection.hello
        with self._lock:
            known, self._said = self._said, hello is not None
        if known == (hello is not None):
            return
        if hello is None:
            log.info(
                "%s: a server of LMCache: one request per key; it cannot list or delete entries, and has no bound",
                self._name,
            )
        else:
            log.info(
                "%s: a kvstrata remote server, frames up to %d MiB, answers in %.1f ms",
                self._name,
                hello.max_frame_bytes >> 20,
                seconds * 1000,
            )

    def close(self) -> None:
        """Close idle connections now and those in use when they are given back. Idempotent."""
        self._connections.close()
