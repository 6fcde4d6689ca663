"""The clients of a server: who they are, and when what they hold may be taken back."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from kvstrata.cache.cache import Cache
from kvstrata.memory.handover import read_session
from kvstrata.types import Namespace

logger = logging.getLogger(__name__)

IDLE_SECONDS = 600.0
"""A session that has no connection to the pool (another host) and is silent for this long is over."""


class Session:
    """One client."""

    __slots__ = ("connections", "name", "namespaces", "seen_at")

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.seen_at = now
        self.namespaces: dict[bytes, Namespace] = {}
        self.connections: set[int] = set()
        """Descriptors of its pool connections. While one is open a process may write to its slots."""


class Sessions:
    """All sessions of a server, by the client's identity on the socket. Used by the server's one thread."""

    def __init__(self, cache: Cache, clock: Callable[[], float]) -> None:
        self._cache = cache
        self._clock = clock
        self._by_identity: dict[bytes, tuple[str, Session]] = {}
        self._by_id: dict[str, Session] = {}
        self._connections: dict[int, tuple[socket.socket, str]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def open(self, identity: bytes, session_id: str, name: str) -> None:
        """A client said hello."""
        session = self._by_id.get(session_id)
        if session is None:
            session = self._by_id[session_id] = Session(name, self._clock())
            logger.info("client %s is here", name)
        self._by_identity[identity] = session_id, session

    def get(self, identity: bytes) -> tuple[str, Session] | None:
        """Session id and session of a sender; None when it has not said hello to this server."""
        found = self._by_identity.get(identity)
        if found is not None:
            found[1].seen_at = self._clock()
        return found

    def connected(self, connection: socket.socket) -> None:
        """A client has the pool; which one it will say next."""
        self._connections[connection.fileno()] = connection, ""

    def readable(self, fd: int) -> bool:
        """A pool connection says its session, or has ended. Whether it is still open."""
        connection, session_id = self._connections[fd]
        said = read_session(connection)
        if said is None:
            del self._connections[fd]
            connection.close()
            self._disconnected(fd, session_id)
            return False
        if said:
            self._connections[fd] = connection, said
            session = self._by_id.get(said)
            if session is not None:
                session.connections.add(fd)
        return True

    def _disconnected(self, fd: int, session_id: str) -> None:
        session = self._by_id.get(session_id)
        if session is None:
            return
        session.connections.discard(fd)
        if not session.connections:
            self._end(session_id, session, "its process ended")

    def goodbye(self, identity: bytes) -> None:
        """A client leaves. What it holds is taken back when its pool connection closes, or now without one."""
        session_id, session = self._by_identity.pop(identity, ("", None))
        if session is not None and not session.connections:
            self._end(session_id, session, "it said goodbye")

    def expire(self) -> None:
        """End sessions that have no pool connection and have been silent for long."""
        now = self._clock()
        for session_id, session in list(self._by_id.items()):
            if not session.connections and now - session.seen_at > IDLE_SECONDS:
                self._end(session_id, session, "it was silent")

    def _end(self, session_id: str, session: Session, why: str) -> None:
        self._cache.drop_owner(session_id)
        del self._by_id[session_id]
        self._by_identity = {i: held for i, held in self._by_identity.items() if held[0] != session_id}
        logger.info("client %s is gone: %s", session.name, why)

    def close(self) -> None:
        for connection, _ in self._connections.values():
            connection.close()
        self._connections.clear()
