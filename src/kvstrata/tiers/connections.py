"""The connections to one server, kept for the next operation."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from kvstrata.errors import TierUnavailable


class Closable(Protocol):
    """A connection. ``closed`` once anything has gone wrong on it."""

    @property
    def closed(self) -> bool: ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


class Busy(TierUnavailable):
    """All connections stay in use: no fault of the server."""


class Connections(Generic[C]):
    """At most so many connections to one server, the last used taken first. Thread-safe."""

    def __init__(self, name: str, num_connections: int, make: Callable[[float], C]) -> None:
        """``make`` connects and logs in within so many seconds, or raises TierUnavailable."""
        self._name = name
        self._make = make
        self._free = threading.BoundedSemaphore(num_connections)
        self._lock = threading.Lock()
        self._idle: list[C] = []
        self._closed = False

    def acquire(self, timeout_seconds: float) -> tuple[C, bool]:
        """A connection for one thread until it is given to :meth:`release`, and whether it is a new one.

        Raises:
            Busy: all connections stay in use.
            TierUnavailable: no new one can be made.
        """
        deadline = time.monotonic() + timeout_seconds
        if not self._free.acquire(timeout=max(timeout_seconds, 0)):
            raise Busy(f"{self._name}: all connections are in use")
        try:
            kept = self._take()
            if kept is not None:
                return kept, False
            return self._make(deadline - time.monotonic()), True
        except BaseException:
            self._free.release()
            raise

    def release(self, connection: C) -> None:
        """Keep a connection for the next operation, unless it was closed."""
        keep = False
        if not connection.closed:
            with self._lock:
                keep = not self._closed
                if keep:
                    self._idle.append(connection)
        if not keep:
            connection.close()
        self._free.release()

    def _take(self) -> C | None:
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
