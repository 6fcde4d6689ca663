"""Faults: each is a context manager over a backend; it lasts as long as the block.

Those of the network need nothing of a backend but its proxies. The others ask it for what they need.
"""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest.mock import patch

from kvstrata.testing.proxy import BLACK_HOLE, REFUSING, Flow, Link, Proxy
from kvstrata.testing.waiting import repeating

OPERATION_SECONDS = 0.5
"""``timeout_seconds`` of the tiers under test."""


class Reached(Protocol):
    """A backend whose clients go through proxies."""

    proxies: list[Proxy]


@dataclass(frozen=True)
class Fault:
    """What goes wrong."""

    name: str
    inject: Callable[..., AbstractContextManager[None]]
    opens: bool = False
    """Whether the breaker must open while it lasts; otherwise it may."""
    serves: bool = False
    """Whether a part of what is stored must be found while it lasts."""


def link(
    link: Link, *, reset: bool = False, only: slice = slice(None)
) -> Callable[[Reached], AbstractContextManager[None]]:
    """That state of the way to all servers, or to ``only`` some of them."""

    @contextmanager
    def inject(backend: Reached) -> Iterator[None]:
        for proxy in backend.proxies[only]:
            proxy.link = link
            if reset:
                proxy.reset()
        yield
        for proxy in backend.proxies[only]:
            proxy.link = Link()
            if not link.refuses:
                proxy.reset()  # what was damaged or held must not arrive later

    return inject


def _garbage(piece: bytes) -> bytes:
    return random.Random(len(piece)).randbytes(len(piece))


LATE = Link(to_client=Flow(delay_seconds=1.5 * OPERATION_SECONDS))
NETWORK = [
    Fault("refuses connections", link(REFUSING), opens=True),
    Fault("accepts and never answers", link(BLACK_HOLE), opens=True),
    Fault("answers after the deadline", link(LATE), opens=True),
    Fault(
        "resets in the middle of a bulk",
        link(Link(to_client=Flow(reset_after_bytes=20_000)), reset=True),
    ),
    Fault("closes in the middle of a bulk", link(Link(to_client=Flow(end_after_bytes=20_000)), reset=True)),
    Fault("answers garbage", link(Link(to_client=Flow(rewrite=_garbage))), opens=True),
    Fault(
        "corrupts bytes",
        link(Link(to_client=Flow(flip_every_bytes=9_973), to_server=Flow(flip_every_bytes=29_989))),
    ),
    Fault("very slow", link(Link(to_client=Flow(bytes_per_second=20_000)))),
]


# Of servers that are processes of ours: `kill`, `start`, `suspend`, `resume`.


class Process(Protocol):
    def kill(self) -> None: ...
    def start(self) -> None: ...
    def suspend(self) -> None: ...
    def resume(self) -> None: ...


class Served(Protocol):
    """A backend with the process that faults hit."""

    server: Process


@contextmanager
def killed(backend: Served) -> Iterator[None]:
    backend.server.kill()
    yield
    backend.server.start()


@contextmanager
def suspended(backend: Served) -> Iterator[None]:
    backend.server.suspend()
    yield
    backend.server.resume()


@contextmanager
def restarted(backend: Served) -> Iterator[None]:
    backend.server.kill()
    backend.server.start()
    yield


RESTARTED = Fault("restarted empty", restarted)
PROCESS = [
    Fault("killed, empty when it is back", killed, opens=True),
    RESTARTED,
    Fault("stopped (SIGSTOP)", suspended, opens=True),
]


# Of what is stored


@contextmanager
def again_and_again(change: Callable[[random.Random], None]) -> Iterator[None]:
    """Call ``change`` without much of a pause, in a thread."""
    rng = random.Random(5)
    with repeating(lambda: change(rng), pause_seconds=0.002):
        yield


class Stored(Protocol):
    """A backend whose entries can be read and written behind the tier's back."""

    def entries(self) -> list[str]: ...
    def get(self, name: str) -> bytes | None: ...
    def put(self, name: str, value: bytes) -> None: ...


@contextmanager
def _changed(backend: Stored, change: Callable[[random.Random], None]) -> Iterator[None]:
    assert any(map(backend.get, backend.entries())), "there is nothing to change"
    with again_and_again(change):
        yield


def _two(backend: Stored, rng: random.Random) -> list[tuple[str, bytes]]:
    names = backend.entries()
    found = [(name, backend.get(name)) for name in rng.sample(names, min(2, len(names)))]
    return [(name, value) for name, value in found if value]


@contextmanager
def swapped(backend: Stored) -> Iterator[None]:
    def swap(rng: random.Random) -> None:
        found = _two(backend, rng)
        if len(found) == 2:
            (one, first), (other, second) = found
            backend.put(one, second)
            backend.put(other, first)

    with _changed(backend, swap):
        yield


@contextmanager
def damaged(backend: Stored) -> Iterator[None]:
    def damage(rng: random.Random) -> None:
        for name, value in _two(backend, rng):
            at = rng.randrange(len(value))
            backend.put(name, value[:at] + bytes([value[at] ^ 1 << rng.randrange(8)]) + value[at + 1 :])

    with _changed(backend, damage):
        yield


@contextmanager
def of_wrong_length(backend: Stored) -> Iterator[None]:
    def cut(rng: random.Random) -> None:
        for name, value in _two(backend, rng):
            cut_at = rng.randrange(len(value))
            backend.put(name, value[:cut_at] if rng.random() < 0.5 else value + value[:cut_at])

    with _changed(backend, cut):
        yield


STORED = [
    Fault("another key's value", swapped),
    Fault("values with a bit flipped", damaged),
    Fault("values of a wrong length", of_wrong_length),
]


# Of the machine


@contextmanager
def clock_steps(_: object) -> Iterator[None]:
    """The wall clock jumps by years, to and fro, with every look at it."""
    true_time = time.time
    rng = random.Random(0)
    with patch("time.time", lambda: max(0.0, true_time() + rng.choice([-3e8, -3600.0, 0.0, 3600.0, 3e8]))):
        yield


def _resolving(wait: Callable[[], object]) -> AbstractContextManager[object]:
    """``wait`` is called when a name is to be resolved; numeric addresses need nobody's answer."""
    resolve = socket.getaddrinfo

    def asked(host: Any, *arguments: Any, **named: Any) -> object:
        if host == "localhost" and not named.get("flags", 0) & socket.AI_NUMERICHOST:
            wait()
        return resolve(host, *arguments, **named)

    return patch("socket.getaddrinfo", asked)


@contextmanager
def _connections_lost(backend: Reached) -> Iterator[None]:
    """Again and again: one that was idle is made anew without asking who the master is, and needs no names."""
    over = threading.Event()

    def reset() -> None:
        while not over.wait(0.05):
            for proxy in backend.proxies:
                proxy.reset()

    thread = threading.Thread(target=reset)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def dns_gone(backend: Reached) -> Iterator[None]:
    def unknown() -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with _resolving(unknown), _connections_lost(backend):
        yield


@contextmanager
def dns_hangs(backend: Reached) -> Iterator[None]:
    """The resolver takes longer than any deadline of ours."""
    over = threading.Event()
    with _resolving(lambda: over.wait(20)), _connections_lost(backend):
        yield
        over.set()


MACHINE = [Fault("clock steps", clock_steps)]
DNS = [Fault("DNS gone", dns_gone, opens=True), Fault("DNS hangs", dns_hangs, opens=True)]


# Of TLS


class Certified(Protocol):
    def use_certificate(self, name: str) -> None: ...


@contextmanager
def _certificate(backend: Certified, name: str) -> Iterator[None]:
    backend.use_certificate(name)
    yield
    backend.use_certificate("server")


TLS = [
    Fault("TLS certificate expired", lambda b: _certificate(b, "expired"), opens=True),
    Fault("TLS certificate of another host", lambda b: _certificate(b, "elsewhere"), opens=True),
]


# Of RESP

_BULK = re.compile(rb"\$(\d+)\r\n")


def _wrong_length(piece: bytes) -> bytes:
    """Every length that the server announces is another."""
    return _BULK.sub(lambda found: b"$%d\r\n" % max(0, int(found[1]) + (7 if len(piece) % 2 else -7)), piece)


RESP = [
    Fault("announces wrong lengths", link(Link(to_client=Flow(rewrite=_wrong_length)), reset=True)),
    Fault(
        "announces 512 MB",
        link(Link(to_client=Flow(rewrite=lambda piece: _BULK.sub(b"$536870912\r\n", piece))), reset=True),
    ),
]
