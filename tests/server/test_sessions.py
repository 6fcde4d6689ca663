"""When what a client holds is taken back."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from kvstrata.cache.cache import Cache
from kvstrata.server.sessions import IDLE_SECONDS, Sessions
from kvstrata.testing.client import make_namespace, prompt
from kvstrata.testing.core import open_core


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache() -> Iterator[Cache]:
    with open_core() as cache:
        yield cache


@pytest.fixture
def sessions(cache: Cache, clock: Clock) -> Iterator[Sessions]:
    sessions = Sessions(cache, clock)
    yield sessions
    sessions.close()


def reserve(cache: Cache, session: str, seed: int = 1) -> None:
    space = cache.intern(make_namespace())
    assert None not in cache.reserve(session, space, 0, prompt(100, seed=seed).pieces)


def num_reserved(cache: Cache) -> int:
    return cache.l1_stats()["reservations"]


def connect(sessions: Sessions, session: str = "") -> tuple[socket.socket, int]:
    """A pool connection: the client's end, and the server's number of its own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    number = theirs.fileno()
    sessions.connected(theirs)
    if session:
        ours.send(session.encode())
        assert sessions.readable(number)
    return ours, number


def end(sessions: Sessions, connection: tuple[socket.socket, int]) -> None:
    connection[0].close()
    assert not sessions.readable(connection[1])


def test_the_end_of_the_pool_connection_ends_the_session(cache: Cache, sessions: Sessions) -> None:
    sessions.open(b"i", "s", "client")
    connection = connect(sessions, "s")
    reserve(cache, "s")
    end(sessions, connection)
    assert (len(sessions), num_reserved(cache), sessions.get(b"i")) == (0, 0, None)


def test_goodbye_waits_for_the_pool_connection(cache: Cache, sessions: Sessions) -> None:
    """Until it is closed the process may write to its slots."""
    sessions.open(b"i", "s", "client")
    connection = connect(sessions, "s")
    reserve(cache, "s")
    sessions.goodbye(b"i")
    assert num_reserved(cache) > 0
    assert sessions.get(b"i") is None
    end(sessions, connection)
    assert num_reserved(cache) == 0


def test_goodbye_of_a_client_without_the_pool_ends_at_once(cache: Cache, sessions: Sessions) -> None:
    sessions.open(b"i", "s", "client")
    reserve(cache, "s")
    sessions.goodbye(b"i")
    assert (len(sessions), num_reserved(cache)) == (0, 0)
    sessions.goodbye(b"i")
    sessions.goodbye(b"never seen")


def test_a_session_lives_as_long_as_any_of_its_connections(cache: Cache, sessions: Sessions) -> None:
    sessions.open(b"i", "s", "client")
    first, second = connect(sessions, "s"), connect(sessions, "s")
    reserve(cache, "s")
    end(sessions, first)
    assert num_reserved(cache) > 0
    end(sessions, second)
    assert num_reserved(cache) == 0


def test_a_session_comes_back_under_another_identity(cache: Cache, sessions: Sessions) -> None:
    sessions.open(b"old", "s", "client")
    connection = connect(sessions, "s")
    reserve(cache, "s")
    sessions.open(b"new", "s", "client")
    assert len(sessions) == 1
    assert sessions.get(b"new") == sessions.get(b"old")
    end(sessions, connection)
    assert sessions.get(b"new") is None
    assert sessions.get(b"old") is None
    assert num_reserved(cache) == 0


def test_silence_ends_only_sessions_without_the_pool(cache: Cache, sessions: Sessions, clock: Clock) -> None:
    for session in ("far", "busy", "near"):
        sessions.open(session.encode(), session, session)
    connection = connect(sessions, "near")
    for seed, session in enumerate(("far", "busy", "near")):
        reserve(cache, session, seed)
    per_session = num_reserved(cache) // 3
    clock.now = IDLE_SECONDS - 1
    assert sessions.get(b"busy") is not None
    sessions.expire()
    assert len(sessions) == 3
    clock.now = IDLE_SECONDS + 1
    sessions.expire()
    assert (len(sessions), num_reserved(cache)) == (2, 2 * per_session)
    assert sessions.get(b"far") is None
    clock.now = 10 * IDLE_SECONDS
    sessions.expire()
    assert len(sessions) == 1
    end(sessions, connection)
    assert num_reserved(cache) == 0


def test_connections_that_say_nothing_or_nonsense(cache: Cache, sessions: Sessions) -> None:
    sessions.open(b"i", "s", "client")
    mine = connect(sessions, "s")
    reserve(cache, "s")
    silent, unknown = connect(sessions), connect(sessions, "unheard of")
    assert sessions.readable(silent[1])  # woken up for nothing
    silent[0].send(b"\xff\xfe")
    assert sessions.readable(silent[1])
    end(sessions, silent)
    end(sessions, unknown)
    assert num_reserved(cache) > 0
    end(sessions, mine)
    assert num_reserved(cache) == 0
