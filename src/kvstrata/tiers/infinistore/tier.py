"""The InfiniStore tier: frames as values of an InfiniStore server, over TCP.

InfiniStore cannot list its keys. ``scan`` knows those that this process wrote, the last ``MAX_KNOWN_KEYS`` of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar
from urllib.parse import parse_qsl, urlsplit

from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.tiers.connections import Connections
from kvstrata.tiers.infinistore import protocol
from kvstrata.tiers.seal import SEAL_BYTES, make_seal
from kvstrata.tiers.sockets import DeadlineSocket, connect, resolve
from kvstrata.types import Miss, MissReason, TierStats

logger = logging.getLogger(__name__)

MAX_KNOWN_KEYS = 1_000_000
CHECKS_PER_REQUEST = 256
"""Look-ups that are sent ahead of their answers, and keys of one delete: they must fit the server's 4 MiB."""
_DISCARD_BYTES = 1 << 20


class InfiniStoreOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the InfiniStore tier. ``timeout_seconds`` bounds one batch."""

    url: str
    """``infinistore://host:port``, the server's ``--service-port``. LMCache's ``?device=`` is accepted; the RDMA
    device that it names plays no part here."""
    connect_timeout_seconds: float = 2.0


class InfiniStoreTier(Tier):
    """Frames in the memory of an InfiniStore server, which evicts by itself."""

    kind: ClassVar[str] = "infinistore"
    Options: ClassVar[type[TierOptions]] = InfiniStoreOptions

    def __init__(self, options: InfiniStoreOptions) -> None:
        """Check the settings; the first connection is made by the first operation.

        Raises:
            ConfigError: a setting cannot be used.
        """
        self.options = options
        self._host, self._port = _address(options.url)
        self._connections = Connections(self.describe(), options.num_workers, self._connect)
        self._lock = threading.Lock()
        self._known: dict[str, None] = {}
        self._said_partial = False

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. One request per key, sent ahead of the answers."""
        held: list[bool] = []
        with self._connection() as sock:
            for first in range(0, len(keys), CHECKS_PER_REQUEST):
                some = keys[first : first + CHECKS_PER_REQUEST]
                sock.send([protocol.check_request(key) for key in some])
                for _ in some:
                    self._expect_finish(sock, "check")
                    held.append(_word(sock) == protocol.EXISTS)
        return held

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`. One request after the other; the kernel copies from the socket into ``buffers``."""
        if not keys:
            return []
        with self._connection() as sock:
            return [self._read(sock, key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _read(self, sock: DeadlineSocket, key: str, buffer: memoryview) -> int | Miss:
        sock.send([protocol.get_request(key)])
        sock.acknowledge_at_once()
        code = _word(sock)
        if code == protocol.NOT_FOUND:
            return Miss(MissReason.ABSENT)
        if code != protocol.FINISH:
            raise sock.violated(f"code {code} for a get")
        total = _word(sock)
        size = total - SEAL_BYTES
        if not 0 <= size <= len(buffer):
            _discard(sock, total)
            return Miss(MissReason.CORRUPT, f"a value of {total} bytes for a frame of at most {len(buffer)}")
        if size:
            sock.receive_all(buffer[:size])
        seal = bytearray(SEAL_BYTES)
        sock.receive_all(memoryview(seal))
        if seal != make_seal(key, buffer[:size]):
            return Miss(MissReason.CORRUPT, "the value's seal is broken")
        return size

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`. Frames are sent from where they are.

        Raises:
            TierFull: the server has no memory for it.
        """
        for key, frame in zip(keys, frames, strict=True):
            size = len(frame) + SEAL_BYTES
            if size > protocol.MAX_VALUE_BYTES:
                raise TierFull(f"a frame of {len(frame)} bytes; InfiniStore's values have less than 2 GiB")
            with self._connection() as sock:
                sock.send([protocol.put_request(key, size), frame, make_seal(key, frame)])
                code = _word(sock)
                if code == protocol.NO_MEMORY:
                    sock.close()  # it takes the value for the next request
                    raise TierFull(f"{self.describe()} has no memory for {size} bytes")
                if code != protocol.FINISH:
                    raise sock.violated(f"code {code} for a put")
            self._wrote(key)

    def _wrote(self, key: str) -> None:
        with self._lock:
            self._known[key] = None
            while len(self._known) > MAX_KNOWN_KEYS:
                del self._known[next(iter(self._known))]

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`."""
        count = 0
        for first in range(0, len(keys), CHECKS_PER_REQUEST):
            some = keys[first : first + CHECKS_PER_REQUEST]
            with self._connection() as sock:
                sock.send([protocol.delete_request(some)])
                self._expect_finish(sock, "delete")
                count += _word(sock)
            with self._lock:
                for key in some:
                    self._known.pop(key, None)
        return count

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`. Only what this process wrote: the server cannot list its keys."""
        if not self._said_partial:
            self._said_partial = True
            logger.warning("InfiniStore cannot list its keys: only what this process wrote is seen")
        with self._lock:
            mine = [key for key in self._known if key.startswith(prefix)]
        for first in range(0, len(mine), CHECKS_PER_REQUEST):
            some = mine[first : first + CHECKS_PER_REQUEST]
            yield from (key for key, held in zip(some, self.contains(some), strict=True) if held)

    def stats(self) -> TierStats:
        """See :class:`Tier`. The server's protocol tells nothing."""
        return TierStats()

    def describe(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"infinistore://{host}:{self._port}"

    def close(self) -> None:
        self._connections.close()

    @contextmanager
    def _connection(self) -> Iterator[DeadlineSocket]:
        """A connection of one's own, with the deadline of one batch; kept unless something goes wrong."""
        sock, _ = self._connections.acquire(self.options.timeout_seconds)
        sock.start(self.options.timeout_seconds)
        try:
            yield sock
        except BaseException:
            sock.close()
            raise
        finally:
            self._connections.release(sock)

    def _connect(self, timeout_seconds: float) -> DeadlineSocket:
        deadline = time.monotonic() + min(timeout_seconds, self.options.connect_timeout_seconds)
        try:
            return DeadlineSocket(
                connect(resolve(self._host, self._port, deadline), deadline), self.describe()
            )
        except OSError as error:
            raise TierUnavailable(f"{self.describe()}: {error}") from error

    def _expect_finish(self, sock: DeadlineSocket, what: str) -> None:
        code = _word(sock)
        if code != protocol.FINISH:
            raise sock.violated(f"code {code} for a {what}")


def _word(sock: DeadlineSocket) -> int:
    word = bytearray(protocol.WORD.size)
    sock.receive_all(memoryview(word))
    value: int = protocol.WORD.unpack(word)[0]
    return value


def _discard(sock: DeadlineSocket, size: int) -> None:
    """Take in a value that is not wanted, so that the next answer is what follows it."""
    if size < 0:
        raise sock.violated(f"a value of {size} bytes")
    scratch = memoryview(bytearray(min(size, _DISCARD_BYTES)))
    while size > 0:
        part = scratch[: min(size, len(scratch))]
        sock.receive_all(part)
        size -= len(part)


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port, query = parts.hostname, parts.port, dict(parse_qsl(parts.query))
    except ValueError:
        host, port, query = None, None, {}
    if not host or not port or query.keys() - {"device"}:
        raise ConfigError("url of the infinistore tier: expected infinistore://HOST:PORT")
    return host, port
