"""One server and the connections to it."""

from __future__ import annotations

import logging
import select
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.lm.connection import Connection
from kvstrata.tiers.lm.endpoint import Endpoint

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
        self._free = threading.BoundedSemaphore(num_connections)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._said: bool | None = None
        self._closed = False

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection whose deadline has been started; kept for the next operation if nothing goes wrong.

        Raises:
            TierUnavailable: all connections stay in use, or no new one can be made.
        """
        deadline = time.monotonic() + self._timeout_seconds
        if not self._free.acquire(timeout=self._timeout_seconds):
            raise TierUnavailable(f"{self._name}: all connections are in use")
        try:
            connection = self._take()
            if connection is None:
                connection = self._connect()
                deadline = time.monotonic() + self._timeout_seconds
            connection.start(deadline - time.monotonic())
            try:
                yield connection
            except TierFull:  # the exchange is complete
                self._give_back(connection)
                raise
            except BaseException:
                connection.close()
                raise
            self._give_back(connection)
        finally:
            self._free.release()

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

    def _give_back(self, connection: Connection) -> None:
        if not connection.closed:
            with self._lock:
                if not self._closed:
                    self._idle.append(connection)
                    return
        connection.close()

    def _connect(self) -> Connection:
        deadline = time.monotonic() + self._connect_timeout_seconds
        try:
            sock = self._endpoint.connect(self._context, self._connect_timeout_seconds)
        except ssl.SSLCertVerificationError as error:
            raise TierUnavailable(f"{self._name}: certificate refused: {error.verify_message}") from error
        except OSError as error:
            reason = "no connection before the deadline" if isinstance(error, TimeoutError) else error
            raise TierUnavailable(f"{self._name}: cannot connect: {reason}") from error
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
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
