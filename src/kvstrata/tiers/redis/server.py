"""One server and the connections to it."""

from __future__ import annotations

import logging
import select
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvstrata.errors import TierError, TierFull, TierUnavailable
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.resp import Connection, ErrorReply, Reply, command

log = logging.getLogger(__name__)

REJOIN_CODES = frozenset({"NOAUTH", "NOPERM", "WRONGPASS", "READONLY", "MASTERDOWN"})
"""Errors after which a connection is not used again: the next may have another login or another server."""


class Server:
    """At most ``num_connections`` connections to one endpoint, the last used taken first. Thread-safe."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        num_connections: int,
        connect_timeout_seconds: float,
        timeout_seconds: float,
        ttl_is_set: bool,
    ) -> None:
        self.endpoint = endpoint
        self._name = endpoint.describe()
        self._context = endpoint.tls_context()
        self._connect_timeout_seconds = connect_timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._ttl_is_set = ttl_is_set
        self._free = threading.BoundedSemaphore(num_connections)
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._introduced = False
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
        if connection.idle and not connection.closed:
            with self._lock:
                if not self._closed:
                    self._idle.append(connection)
                    return
        connection.close()

    def _connect(self) -> Connection:
        deadline = time.monotonic() + self._connect_timeout_seconds
        try:
            sock = self.endpoint.connect(self._context, self._connect_timeout_seconds)
        except ssl.SSLCertVerificationError as error:
            raise TierUnavailable(f"{self._name}: certificate refused: {error.verify_message}") from error
        except OSError as error:
            reason = "no connection before the deadline" if isinstance(error, TimeoutError) else error
            raise TierUnavailable(f"{self._name}: cannot connect: {reason}") from error
        connection = Connection(sock, self._name)
        try:
            connection.start(deadline - time.monotonic())
            self._log_in(connection)
            self._introduce(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _log_in(self, connection: Connection) -> None:
        endpoint = self.endpoint
        commands = []
        if endpoint.password or endpoint.username:
            user = [endpoint.username.encode()] if endpoint.username else []
            commands.append(command(b"AUTH", *user, endpoint.password.encode()))
        if endpoint.db:
            commands.append(command(b"SELECT", b"%d" % endpoint.db))
        commands.append(command(b"PING"))
        connection.send(commands)
        for reply in [connection.reply() for _ in commands]:
            if isinstance(reply, ErrorReply):
                raise TierUnavailable(f"{self._name}: refused: {self._masked(reply.text)}")

    def _masked(self, text: str) -> str:
        """``text`` of the server without the password, which some servers and proxies repeat."""
        password = self.endpoint.password
        return text.replace(password, "***") if password else text

    def refusal(self, connection: Connection, reply: ErrorReply) -> TierError:
        """The exception for an error reply; out of memory is :class:`TierFull`, all else is unavailable."""
        if reply.code in REJOIN_CODES:
            connection.close()
        kind = TierFull if reply.code == "OOM" else TierUnavailable
        return kind(f"{self._name}: {self._masked(reply.text)}")

    def info(self, connection: Connection, section: bytes) -> dict[str, str]:
        """The lines of INFO. Raises TierUnavailable when the server refuses."""
        connection.send([command(b"INFO", section)])
        reply = connection.reply()
        if isinstance(reply, ErrorReply):
            raise self.refusal(connection, reply)
        return _info_lines(reply)

    def _introduce(self, connection: Connection) -> None:
        """Log once what the server is, and how it is set up to make room."""
        with self._lock:
            if self._introduced:
                return
            self._introduced = True
        started = time.monotonic()
        try:
            connection.send([command(b"INFO", b"server"), command(b"INFO", b"memory")])
            replies = [connection.reply(), connection.reply()]
        except TierUnavailable:
            self._introduced = False
            raise
        latency = time.monotonic() - started
        refusals = [reply for reply in replies if isinstance(reply, ErrorReply)]
        if refusals:
            log.info("%s: connected; INFO is refused (%s)", self._name, self._masked(refusals[0].text))
            return
        found = {**_info_lines(replies[0]), **_info_lines(replies[1])}
        kind = "Valkey" if "valkey_version" in found else "Redis"
        version = found.get("valkey_version") or found.get("redis_version", "of unknown version")
        policy = found.get("maxmemory_policy", "unknown")
        maxmemory = found.get("maxmemory", "unknown")
        log.info(
            "%s: %s %s, maxmemory %s, maxmemory-policy %s, answers in %.1f ms",
            self._name,
            kind,
            version,
            "not set" if maxmemory == "0" else f"{maxmemory} bytes",
            policy,
            latency * 500,
        )
        if policy.startswith("allkeys-") and maxmemory != "0":
            return
        if not self._ttl_is_set:
            log.warning(
                "%s: nothing removes old entries (maxmemory %s, maxmemory-policy %s, no ttl_seconds). Set for"
                " example `maxmemory 80gb` and `maxmemory-policy allkeys-lru` there, or ttl_seconds here",
                self._name,
                "not set" if maxmemory == "0" else maxmemory,
                policy,
            )

    def close(self) -> None:
        """Close idle connections now and those in use when they are given back. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _info_lines(reply: Reply) -> dict[str, str]:
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
