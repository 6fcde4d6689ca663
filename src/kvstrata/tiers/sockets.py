"""Blocking sockets with one deadline per operation, made for values of megabytes. What network tiers share.

Values go from and to the caller's memory without a copy in between. Whatever goes wrong in the middle of a
message closes the socket: it is never used again, so no reply is taken for that of another request.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kvstrata.errors import TierUnavailable
from kvstrata.types import Buffer

SOCKET_BYTES = 1 << 20
"""Socket buffers: 1 MiB measured 20% faster than the default on loopback, 4 MiB not faster."""
MAX_PARTS = 512
"""Buffers per sendmsg; the system allows 1024."""
_UNIX_PIECE_BYTES = 32 << 10
"""Linux cuts what is sent over a Unix socket into pieces of at least so many bytes, and waits for SO_SNDTIMEO
before each of them: a peer that is slow but goes on made one call last a hundred times as long. So each piece has
its share of the time. Calls that do not block kept to the deadline, too, and were a quarter slower beside a busy
Python thread."""

Address = tuple[socket.AddressFamily, Any]
"""A family and what ``socket.connect`` wants in it."""


class DeadlineSocket:
    """A connected socket. Used by one thread at a time.

    ``start`` sets a deadline; every method ends by then. Those that send or receive raise
    :class:`TierUnavailable` when the peer is gone or late; the socket is closed then.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        """Take over ``sock``; ``name`` says in messages who the peer is, without secrets."""
        self._sock = sock
        self._name = name
        self._deadline = 0.0
        self._tls = isinstance(sock, ssl.SSLSocket)
        self.closed = False
        if not self._tls:
            # Blocking with kernel timeouts: one system call moves a whole value. Measured with a busy Python
            # thread beside it: 3 to 5 times the throughput of many short calls, each of which gives the
            # interpreter lock away.
            sock.setblocking(True)

    def start(self, timeout_seconds: float) -> None:
        """Begin an operation that ends within ``timeout_seconds`` from now."""
        self._deadline = time.monotonic() + timeout_seconds

    def close(self) -> None:
        self.closed = True
        self._sock.close()

    def fileno(self) -> int:
        """For polling."""
        return self._sock.fileno()

    def acknowledge_at_once(self) -> None:
        """Do not wait 40 ms for something to send along with the next acknowledgement.

        For servers that send an answer in small pieces, each of which waits for it. Wears off: ask each time.
        """
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send ``parts`` one after the other."""
        views = [memoryview(part) for part in parts if len(part)]
        first = 0
        while first < len(views):
            sent = self._send(views[first : first + MAX_PARTS])
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]

    def _send(self, views: list[memoryview]) -> int:
        num_waits = 1
        if self._sock.family == socket.AF_UNIX:
            num_waits += sum(map(len, views)) // _UNIX_PIECE_BYTES
        while True:
            try:
                if self._tls:
                    self._sock.settimeout(self._remaining())
                    return self._sock.send(views[0])
                patience = _timeval(self._remaining() / num_waits)
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
                return self._sock.sendmsg(views)
            except BlockingIOError:
                continue  # not within its share; whether there is time left, ``_remaining`` says
            except OSError as error:
                raise self._broken(error) from error

    def receive(self, view: memoryview, *, whole: bool = True) -> int:
        """Receive at least a byte; with ``whole`` as much of ``view`` as comes before the deadline."""
        try:
            if self._tls:
                self._sock.settimeout(self._remaining())
                count = self._sock.recv_into(view)
            else:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(self._remaining()))
                count = self._sock.recv_into(view, 0, socket.MSG_WAITALL if whole else 0)
        except OSError as error:
            raise self._broken(error) from error
        if count == 0:
            raise self._broken(ConnectionResetError("the server closed the connection"))
        return count

    def receive_all(self, view: memoryview) -> None:
        """Fill ``view``."""
        done = 0
        while done < len(view):
            done += self.receive(view[done:])

    def violated(self, what: str) -> TierUnavailable:
        """Close, and make the exception for a peer that breaks its protocol."""
        self.close()
        return TierUnavailable(f"{self._name}: the server broke the protocol: {what}")

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    def _broken(self, error: OSError) -> TierUnavailable:
        self.close()
        late = isinstance(error, TimeoutError | BlockingIOError)
        reason = "no answer before the deadline" if late else error.strerror or error
        return TierUnavailable(f"{self._name}: {reason}")


class _TLSSocket(ssl.SSLSocket):
    """Closed when the peer has reset the connection before the handshake: ``wrap_socket`` forgets it then."""

    def getpeername(self) -> Any:
        try:
            return super().getpeername()
        except OSError as error:
            self.close()
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from error


@contextlib.contextmanager
def connecting(name: str) -> Iterator[None]:
    """Turn what goes wrong in connecting to the server ``name`` into :class:`TierUnavailable`."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise TierUnavailable(f"{name}: certificate refused: {error.verify_message}") from error
    except OSError as error:
        reason = "no connection before the deadline" if isinstance(error, TimeoutError) else error
        raise TierUnavailable(f"{name}: cannot connect: {reason}") from error


def fair_share(deadline: float, num_left: int) -> float:
    """The seconds that the next of ``num_left`` servers may take: what hangs must leave time for the others, and
    yet a share must be enough to log in where there are hundreds."""
    return (deadline - time.monotonic()) / min(num_left, 3)


def connect(
    addresses: Sequence[Address],
    deadline: float,
    *,
    context: ssl.SSLContext | None = None,
    server_hostname: str = "",
) -> socket.socket:
    """A socket connected to the first of ``addresses`` that answers, its TLS handshake done. One that hangs leaves
    time for the others: a host of several that is lost, or a route of IPv6 that leads nowhere.

    ``deadline``: on the clock ``time.monotonic``, for all of it.

    Raises:
        OSError: refused, certificate not trusted, or not done in time.
    """
    sock = _first(addresses, deadline)
    try:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        if sock.family == socket.AF_UNIX:
            return sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if context is None:
            return sock
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        context.sslsocket_class = _TLSSocket
        return context.wrap_socket(sock, server_hostname=server_hostname)
    except BaseException:
        sock.close()
        raise


def _first(addresses: Sequence[Address], deadline: float) -> socket.socket:
    failure: OSError = OSError("no address")
    for number, (family, address) in enumerate(addresses):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(fair_share(deadline, len(addresses) - number), 0.001))
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


class _Lookup:
    """One question to the resolver, for all that wait for its answer."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.addresses: list[Address] = []
        self.error: OSError | None = None


_lookups: dict[tuple[str, int], _Lookup] = {}
_lookups_lock = threading.Lock()


def resolve(host: str, port: int, deadline: float) -> list[Address]:
    """The addresses of a host, asked for anew each time; ``getaddrinfo`` with a deadline, which it does not have.

    Raises:
        OSError: unknown, or no answer in time.
    """
    with contextlib.suppress(socket.gaierror, UnicodeError):
        return _addresses(host, port, socket.AI_NUMERICHOST)
    with _lookups_lock:
        lookup = _lookups.get((host, port))
        if lookup is None:
            lookup = _lookups[host, port] = _Lookup()
            # A name server that does not answer keeps one thread for each name for the resolver's own timeout,
            # not the caller.
            thread = threading.Thread(
                target=_answer, args=(lookup, host, port), name="kvstrata-resolve", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                del _lookups[host, port]
                raise OSError(f"no thread to look up {host}: {error}") from None
    if not lookup.answered.wait(max(deadline - time.monotonic(), 0.001)):
        raise TimeoutError(f"the address of {host} was not found in time")
    if lookup.error is not None:
        raise OSError(lookup.error.errno, lookup.error.strerror or str(lookup.error))
    return lookup.addresses


def _answer(lookup: _Lookup, host: str, port: int) -> None:
    try:
        lookup.addresses = _addresses(host, port)
    except OSError as error:
        lookup.error = error
    except UnicodeError:
        lookup.error = OSError(socket.EAI_NONAME, f"{host!r} is no host name")
    with _lookups_lock:
        del _lookups[host, port]
    lookup.answered.set()


def _addresses(host: str, port: int, flags: int = 0) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]


def _timeval(seconds: float) -> bytes:
    """``struct timeval``; never zero, which would mean to wait for ever."""
    micros = max(int(seconds * 1_000_000), 1)
    return struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)
