"""What a remote server does for its clients: memory, disk, limits. One event loop; no connection, no protocol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable

import msgspec

from kvstrata import plugins
from kvstrata.config import GIB
from kvstrata.errors import ProtocolError
from kvstrata.remote.shelf import Shelf
from kvstrata.remote.store import Entry, Store
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.lm import wire

log = logging.getLogger(__name__)

_MAX_SCANS = 16
"""Scans whose list of keys is kept for their next page; the oldest ones have to start over."""
_MAX_EXAMINED = 1 << 16
"""Keys looked at for one page."""
_MAX_PAGE = 4096
_PATIENCE = 2
"""How long a value waits for its turn to be received, in times of a message."""
_MAX_KEYS_BYTES = 64 << 20
"""Of the lists of keys of all calls together; those that are small do not count, or a few slow clients with long
lists would keep everybody from looking up."""
_FEW_KEYS_BYTES = 64 << 10
_KEY_BYTES = 128
"""What a key takes in memory besides its bytes."""
_QUIET_SECONDS = 10.0
"""Complaints about clients within this time are counted, not logged one by one."""


class RemoteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a remote server is set up."""

    host: str
    port: int
    """0: one that is free."""
    max_bytes: int = 5 * GIB
    """Budget of the entries in memory."""
    policy: str = "lru"
    ttl_seconds: int | None = None
    """The longest that an entry lives; clients may ask for less."""
    disk: str | None = None
    """Directory in which entries survive a restart."""
    max_disk_bytes: int = 50 * GIB
    token: bytes = b""
    """What clients must prove to have; those of LMCache cannot."""
    tls_cert: str | None = None
    tls_key: str | None = None
    max_frame_bytes: int = 256 << 20
    max_connections: int = 16_384
    message_seconds: float = 10.0
    """Within that time a message must have come or gone, and a connection must have shown that it has the token."""
    min_bytes_per_second: int = 8 << 20
    """Values of messages get the time on top that they take at this rate."""
    drain_seconds: float = 10.0
    """How long what is in flight may take to end when the server stops, and then the same for writing to disk."""
    extensions: bool = True
    """False: only what LMCache's server does, for tests."""


class Counters(msgspec.Struct):
    """What happened since the start."""

    connections: int = 0
    """Open now."""
    refused: int = 0
    """Connections that were ended for what they sent."""
    dropped_writes: int = 0
    """Values that were too large, or for which there was no room."""


class InFlight:
    """A bound on the bytes that are being received, over all connections. First come, first served."""

    def __init__(self, max_bytes: int) -> None:
        self._free = self.max_bytes = max_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int, timeout_seconds: float) -> bool:
        """Wait for room for ``size`` bytes, which is at most ``max_bytes``; False when there was none in time."""
        if not self._waiting and size <= self._free:
            self._free -= size
            return True
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            async with asyncio.timeout(timeout_seconds):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # its turn came in the same moment
                self.give_back(size)
            else:
                with contextlib.suppress(ValueError):  # passed over already
                    self._waiting.remove((size, turn))
                self.give_back(0)  # those behind it may have been waiting for it only
            if isinstance(error, TimeoutError):
                return False
            raise
        return True

    def give_back(self, size: int) -> None:
        """End what ``take`` began."""
        self._free += size
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            wanted, turn = self._waiting.popleft()
            if turn.done():  # it was cancelled, and its task has not run since
                continue
            self._free -= wanted
            turn.set_result(None)


class Service:
    """Entries by key, in memory and on disk. Used on the event loop's thread."""

    def __init__(self, options: RemoteOptions) -> None:
        """Take memory and open the disk. Must be called on the event loop.

        Raises:
            ConfigError: there is not that much memory, or the directory cannot be used.
        """
        self.options = options
        self.counters = Counters()
        self.draining = False
        self.store = Store(options.max_bytes, plugins.load("policies", options.policy)())
        self.in_flight = InFlight(max(options.max_frame_bytes, self.store.capacity_bytes // 4))
        self.keys_in_flight = InFlight(_MAX_KEYS_BYTES)
        self.shelf: Shelf | None = None
        if options.disk is not None:
            disk = DiskTier(DiskOptions(path=options.disk, max_bytes=options.max_disk_bytes))
            self.shelf = Shelf(disk, self.store, self.store.capacity_bytes // 4)
        self._scans: OrderedDict[int, list[bytes]] = OrderedDict()
        self._scan_numbers = itertools.count(1)
        self._complained_at = -_QUIET_SECONDS
        self._num_silent = 0

    async def take_keys(self, num_keys: int, num_bytes: int) -> int:
        """Wait for room for a list of keys; what to give back to ``keys_in_flight`` once it has been used or sent.

        Raises:
            ProtocolError: there was none in time.
        """
        size = min(num_bytes + num_keys * _KEY_BYTES, self.keys_in_flight.max_bytes)
        if size <= _FEW_KEYS_BYTES:
            return 0
        if not await self.keys_in_flight.take(size, _PATIENCE * self.options.message_seconds):
            raise ProtocolError(f"no room for a list of {num_keys} keys: ask for fewer at once")
        return size

    async def receive(
        self, key: bytes, size: int, fill: Callable[[memoryview], Awaitable[None]]
    ) -> Entry | wire.Status:
        """A new entry, pinned and not yet seen by others, that ``fill`` has filled; or why there is none.

        Without an entry nothing has been received.
        """
        if size > self.options.max_frame_bytes or not self.store.fits(size):
            self.counters.dropped_writes += 1
            return wire.Status.TOO_LARGE
        if not await self.in_flight.take(size, _PATIENCE * self.options.message_seconds):
            self.counters.dropped_writes += 1
            return wire.Status.FULL
        try:
            entry = self.store.reserve(key, size)
            if entry is None:
                self.counters.dropped_writes += 1
                return wire.Status.FULL
            try:
                await fill(self.store.value(entry))
            except BaseException:
                self.store.abort(entry)
                raise
        finally:
            self.in_flight.give_back(size)
        return entry

    def commit(self, entry: Entry, ttl_seconds: int) -> None:
        """Everybody sees ``entry`` from now on; its pin is given back."""
        limits = [seconds for seconds in (ttl_seconds, self.options.ttl_seconds) if seconds]
        if limits:
            entry.expires_at = time.time() + min(limits)
        self.store.commit(entry)
        if self.shelf is not None:
            self.shelf.save(entry)
        self.store.unpin(entry)

    async def find(self, key: bytes) -> Entry | None:
        """The entry of ``key``, pinned; from disk, if it is not in memory."""
        entry = self.store.get(key, time.time())
        if entry is not None or self.shelf is None:
            return entry
        size = self.shelf.size(key)
        if size is None or size > self.options.max_frame_bytes or not self.store.fits(size):
            return None
        if not await self.in_flight.take(size, _PATIENCE * self.options.message_seconds):
            return None
        try:
            return await self._load(self.shelf, key, size)
        finally:
            self.in_flight.give_back(size)

    async def _load(self, shelf: Shelf, key: bytes, size: int) -> Entry | None:
        loaded = self.store.reserve(key, size)
        if loaded is None:
            return None
        try:
            found = await shelf.load(key, loaded)
        except BaseException:
            self.store.abort(loaded)
            raise
        newer = self.store.get(key, time.time())
        if newer is not None or not found:
            self.store.abort(loaded)
            return newer
        self.store.commit(loaded)
        return loaded

    def contains(self, key: bytes) -> bool:
        """Whether ``key`` is held."""
        return self.store.contains(key, time.time()) or (self.shelf is not None and self.shelf.contains(key))

    async def delete(self, keys: list[bytes]) -> int:
        """Drop ``keys``; return how many were held."""
        distinct = list(dict.fromkeys(keys))
        count = sum(self.contains(key) for key in distinct)
        for key in distinct:
            self.store.delete(key)
        if self.shelf is not None:
            await self.shelf.delete(distinct)
            for key in distinct:  # what was read from disk before the files were gone
                self.store.delete(key)
        return count

    def held_keys(self) -> list[bytes]:
        """All keys that are held; on disk, those that are named by themselves."""
        held = self.store.keys(time.time())
        if self.shelf is None:
            return held
        return list(dict.fromkeys([*held, *self.shelf.held_keys()]))

    def scan_page(self, prefix: bytes, cursor: bytes) -> tuple[bytes, list[bytes]] | None:
        """Where to go on (empty at the end), and some keys; None for a cursor that is not known any more.

        A scan walks over the keys that were held when it began. No page takes long.
        """
        number, at = 0, 0
        if cursor:
            fields = cursor.split(b":")
            if len(fields) != 2 or not all(field.isdigit() and len(field) < 20 for field in fields):
                return None
            number, at = map(int, fields)
            if number not in self._scans:
                return None
            keys = self._scans[number]
        else:
            keys = self.held_keys()
        found: list[bytes] = []
        end = min(len(keys), at + _MAX_EXAMINED)
        while at < end and len(found) < _MAX_PAGE:
            if keys[at].startswith(prefix):
                found.append(keys[at])
            at += 1
        if at >= len(keys):
            self._scans.pop(number, None)
            return b"", found
        if not number:
            number = next(self._scan_numbers)
            self._scans[number] = keys
            if len(self._scans) > _MAX_SCANS:
                self._scans.popitem(last=False)
        return b"%d:%d" % (number, at), found

    def stats(self) -> tuple[int, int, int]:
        """Entries in memory, bytes used there, and the budget."""
        return len(self.store), self.store.used_bytes, self.store.capacity_bytes

    def expire(self) -> None:
        """Drop what has expired; to be called now and then."""
        expired = self.store.expire(time.time())
        if expired and self.shelf is not None:
            self.shelf.discard(expired)

    def complain(self, text: str) -> None:
        """Log what a client did wrong; many at once are counted."""
        self.counters.refused += 1
        now = time.monotonic()
        if now - self._complained_at < _QUIET_SECONDS:
            self._num_silent += 1
            return
        more = f" ({self._num_silent} more since the last such message)" if self._num_silent else ""
        log.warning("%s%s", text, more)
        self._complained_at, self._num_silent = now, 0

    def close(self) -> None:
        """Give memory and disk back."""
        if self.shelf is not None:
            self.shelf.close()
        self.store.close()
