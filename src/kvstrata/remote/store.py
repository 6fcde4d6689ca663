"""What a remote server holds in memory: a state machine without I/O, lock or clock of its own.

    reserve ──> filling ──commit──> held ──evict, delete, replace, expire──> dropped ──last unpin──> freed
                        └─abort──> freed

Whoever reads or writes an entry's memory has it pinned: a slot is never freed or used again under a pin, so a reply
in progress is never torn by what replaces its entry.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import mmap

from kvstrata.errors import ConfigError
from kvstrata.memory.headroom import available_memory_bytes
from kvstrata.memory.pool import SlotAllocator, slot_bytes
from kvstrata.policies.base import EvictionPolicy
from kvstrata.remote.envelope import ENVELOPE_BYTES
from kvstrata.tiers.lm.wire import Form

_MAX_PASSED_OVER = 10_000
"""Victims that one reservation looks at; more means that nearly all entries are in use."""
_NEVER = math.inf


class Entry:
    """One value and where it lies. A slot holds its envelope, then its bytes."""

    __slots__ = ("checksum", "dropped", "expires_at", "form", "key", "offset", "pins", "saved", "size")

    def __init__(self, key: bytes, offset: int, size: int) -> None:
        self.key = key
        self.offset = offset
        self.size = size
        """Bytes of the value, without the envelope."""
        self.form = Form()
        self.checksum = 0
        """What the writer gave, 0 if nothing."""
        self.expires_at = _NEVER
        """Unix seconds."""
        self.pins = 1
        self.dropped = False
        self.saved = False
        """Whether it is on disk, or queued for it."""


class Store:
    """Entries within ``capacity_bytes`` of memory. Used by one thread."""

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy) -> None:
        """Map the memory; the kernel gives pages as they are first used.

        Raises:
            ConfigError: there is not that much memory.
        """
        available = available_memory_bytes()
        if capacity_bytes < slot_bytes(1) or (available is not None and capacity_bytes > available):
            raise ConfigError(
                f"a store of {capacity_bytes} bytes is not possible: expected at least {slot_bytes(1)}, and at most"
                f" the {available} bytes of memory that are available (--max-size-gb)"
            )
        try:
            self._memory = mmap.mmap(-1, capacity_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"no memory for a store of {capacity_bytes} bytes (--max-size-gb): {error}"
            ) from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._memory)
        self._slots = SlotAllocator(capacity_bytes)
        self._policy = policy
        self._entries: dict[bytes, Entry] = {}
        self._expiries: list[tuple[float, int, Entry]] = []
        self._numbers = itertools.count()
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots, those being filled or still read included."""
        return self._slots.used_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._slots.capacity_bytes

    @property
    def entries(self) -> list[Entry]:
        """All that are held."""
        return list(self._entries.values())

    def keys(self, now: float) -> list[bytes]:
        """The keys of all that are held and have not expired."""
        return [key for key, entry in self._entries.items() if entry.expires_at > now]

    def fits(self, size: int) -> bool:
        """Whether a value of ``size`` bytes fits an empty store."""
        return slot_bytes(ENVELOPE_BYTES + size) <= self._slots.capacity_bytes

    def value(self, entry: Entry) -> memoryview:
        """The bytes of a pinned entry."""
        start = entry.offset + ENVELOPE_BYTES
        return self._view[start : start + entry.size]

    def enveloped(self, entry: Entry) -> memoryview:
        """The same with the room for the envelope in front."""
        return self._view[entry.offset : entry.offset + ENVELOPE_BYTES + entry.size]

    def reserve(self, key: bytes, size: int) -> Entry | None:
        """A pinned entry to be filled, evicting as needed. Nobody sees it before ``commit``.

        None when there is no room that could be made now.
        """
        needed = ENVELOPE_BYTES + size
        offset = self._slots.allocate(needed)
        if offset is None and self.fits(size):
            offset = self._evict_for(needed)
        return None if offset is None else Entry(key, offset, size)

    def _evict_for(self, needed: int) -> int | None:
        for key in itertools.islice(self._policy.victims(), _MAX_PASSED_OVER):
            entry = self._entries[key]
            if entry.pins:
                self._policy.touched(key)
                continue
            self._drop(entry, evicted=True)
            self.num_evicted += 1
            offset = self._slots.allocate(needed)
            if offset is not None:
                return offset
        return None

    def commit(self, entry: Entry) -> None:
        """``entry`` is filled: it is held from now on, in place of what had its key. Stays pinned."""
        before = self._entries.get(entry.key)
        if before is not None:
            self._drop(before)
        self._entries[entry.key] = entry
        self._policy.added(entry.key, entry.size)
        if entry.expires_at < _NEVER:
            heapq.heappush(self._expiries, (entry.expires_at, next(self._numbers), entry))
            if len(self._expiries) > 2 * len(self._entries) + 1000:
                self._expiries = [item for item in self._expiries if not item[2].dropped]
                heapq.heapify(self._expiries)

    def abort(self, entry: Entry) -> None:
        """``entry`` was reserved and will not be filled."""
        entry.dropped = True
        self.unpin(entry)

    def get(self, key: bytes, now: float) -> Entry | None:
        """The entry of ``key``, pinned; this is a use of it."""
        entry = self._entries.get(key)
        if entry is None or entry.expires_at <= now:
            return None
        self._policy.touched(key)
        entry.pins += 1
        return entry

    def pin(self, entry: Entry) -> None:
        """One more that uses the entry's memory; it is pinned already or held."""
        entry.pins += 1

    def unpin(self, entry: Entry) -> None:
        """One fewer that uses the entry's memory."""
        entry.pins -= 1
        if entry.dropped and not entry.pins:
            self._slots.free(entry.offset)

    def contains(self, key: bytes, now: float) -> bool:
        """Whether ``key`` is held; this is no use of it."""
        entry = self._entries.get(key)
        return entry is not None and entry.expires_at > now

    def delete(self, key: bytes) -> bool:
        """Drop ``key``; whether it was held."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        self._drop(entry)
        return True

    def expire(self, now: float) -> list[bytes]:
        """Drop what has expired; return its keys."""
        expired = []
        while self._expiries and self._expiries[0][0] <= now:
            entry = heapq.heappop(self._expiries)[2]
            if not entry.dropped:
                self._drop(entry)
                expired.append(entry.key)
        return expired

    def _drop(self, entry: Entry, *, evicted: bool = False) -> None:
        del self._entries[entry.key]
        self._policy.removed(entry.key, evicted=evicted)
        entry.dropped = True
        if not entry.pins:
            self._slots.free(entry.offset)

    def close(self) -> None:
        """Let the memory go; views that others still hold keep it until they are gone. Idempotent."""
        self._entries.clear()
        try:
            self._view.release()
            self._memory.close()
        except BufferError:
            return
