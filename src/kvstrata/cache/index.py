"""What L1 holds: a pure state machine. No I/O, no lock, no clock of its own; ``cache.Cache`` guards it.

    reserve ──> WRITING ──commit──> READY ──evict, delete──> freed
    prefetch ─> LOADING ──loaded──> READY
    any of them ──dropped while leased──> DROPPED ──last lease ends──> freed

A slot holds one frame: a header of ``HEADER_BYTES``, then the payload, so that a frame goes to and comes from
a tier without a copy; behind it is room for what a codec may add. Only READY entries without a lease and without
a child in L1 are evicted, so that tails and the ends of chains go before the prefixes that they depend on. A slot
is never freed under a lease.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable

import msgspec

from kvstrata.frame import room_bytes
from kvstrata.memory.pool import SlotAllocator
from kvstrata.policies.base import EvictionPolicy
from kvstrata.types import MissReason, Namespace, Piece

_MAX_PASSED_OVER = 10_000
"""Victims that one allocation looks at; more means that nearly all of L1 is in use."""
_MAX_PARENTS_KEPT = 1000
"""Entries with continuations that keep their place in the order; beyond them it costs too much to pass over."""
_MAX_GHOSTS = 65_536
"""Evicted keys that are remembered, to tell an evicted miss from an absent one."""


class State(enum.IntEnum):
    """Where an entry is in its life."""

    WRITING = 0
    LOADING = 1
    READY = 2
    DROPPED = 3


def entry_key(chunk_hash: bytes, shard: int) -> bytes:
    """The index key of one shard."""
    return chunk_hash + shard.to_bytes(2, "little")


class Entry(msgspec.Struct, eq=False, gc=False):
    """The index record of one shard in L1. A million of these exist: no field without a need.

    The garbage collector does not know them (they hold no reference to each other, so there are no cycles): a
    full collection over a million of them takes a fifth of the time that it takes over ordinary objects.
    """

    key: bytes
    namespace: Namespace
    first_token: int
    num_tokens: int
    offset: int
    """Where the frame begins in the pool."""
    state: State
    parent: bytes | None
    """The key of the piece before it, held or not; None at the start of a sequence."""
    root: bytes = b""
    """The start of its chain, which tells namespace and salt; empty when its parent was not held."""
    num_children: int = 0
    """Held entries whose parent this is."""
    leases: int = 0
    """Lookups, reservations and moves that need the slot to stay."""
    tiers: int = 0
    """Bit mask of the tiers that hold it, or will after a queued write."""

    @property
    def chunk_hash(self) -> bytes:
        return self.key[:-2]

    @property
    def shard(self) -> int:
        return int.from_bytes(self.key[-2:], "little")

    @property
    def payload_bytes(self) -> int:
        return self.namespace.layout.payload_bytes(self.num_tokens)


class Index:
    """The entries of L1, their slots and their order of eviction."""

    def __init__(self, allocator: SlotAllocator, policy: EvictionPolicy) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.allocator = allocator
        self.policy = policy
        self.num_evicted = 0
        self.num_evicted_for_budget = 0
        """Of those, the ones that went because the budget was lowered."""
        self._ghosts: dict[bytes, None] = {}
        self._awaited: dict[bytes, int] = {}
        """Parents that are not held -> how many held entries wait for them. They come before their time when a
        tier has lost the parent, or delivers it last."""

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, chunk_hash: bytes, shard: int) -> Entry | None:
        return self.entries.get(entry_key(chunk_hash, shard))

    def insert(
        self, namespace: Namespace, piece: Piece, shard: int, state: State, *, root: bytes = b""
    ) -> Entry | None:
        """A new entry with a slot and one lease, evicting as needed; None when there is no room for it now.

        The key must not be held. ``root`` is the start of its chain, where the caller knows it.
        """
        slot_bytes = room_bytes(namespace.layout.payload_bytes(piece.num_tokens))
        parent = self._parent_key(piece, shard)
        # First, so that the parent is not the victim that makes room for its child.
        self._add_child(parent, 1)
        offset = self._allocate(slot_bytes)
        if offset is None:
            self._add_child(parent, -1)
            return None
        key = entry_key(piece.chunk_hash, shard)
        root = (piece.parent_hash if parent is None else self._root_of(parent)) or root
        entry = Entry(key, namespace, piece.first_token, piece.num_tokens, offset, state, parent, root)
        entry.num_children = self._awaited.pop(key, 0)
        entry.leases = 1
        self.entries[key] = entry
        self._ghosts.pop(key, None)
        self.policy.added(key, slot_bytes)
        return entry

    def _parent_key(self, piece: Piece, shard: int) -> bytes | None:
        if piece.first_token == 0:
            return None
        key = entry_key(piece.parent_hash, shard)
        parent = self.entries.get(key)
        return key if parent is None else parent.key  # one object for both: it counts, a million times

    def _root_of(self, key: bytes) -> bytes:
        entry = self.entries.get(key)
        return b"" if entry is None else entry.root

    def _add_child(self, parent: bytes | None, number: int) -> None:
        """``number`` more held entries have this parent."""
        if parent is None:
            return
        entry = self.entries.get(parent)
        if entry is not None:
            entry.num_children += number
            return
        awaited = self._awaited.get(parent, 0) + number
        if awaited:
            self._awaited[parent] = awaited
        else:
            del self._awaited[parent]

    def _allocate(self, size_bytes: int) -> int | None:
        offset = self.allocator.allocate(size_bytes)
        if offset is not None or size_bytes > self.allocator.budget_bytes:
            return offset
        victims = itertools.islice(self.policy.victims(), _MAX_PASSED_OVER)
        for passed, key in enumerate(victims):
            entry = self.entries[key]
            if entry.num_children and passed < _MAX_PARENTS_KEPT:
                continue  # its continuations come later in the order, and go first
            if entry.state is not State.READY or entry.leases or entry.num_children:
                self.policy.touched(key)
                continue
            self.drop(entry, evicted=True)
            offset = self.allocator.allocate(size_bytes)
            if offset is not None:
                return offset
        return None

    def drop(self, entry: Entry, *, evicted: bool = False) -> None:
        """Forget an entry. Its slot is freed now, or when its last lease ends."""
        del self.entries[entry.key]
        self.policy.removed(entry.key, evicted=evicted)
        if entry.num_children:
            self._awaited[entry.key] = entry.num_children
        self._add_child(entry.parent, -1)
        entry.state = State.DROPPED
        if entry.leases == 0:
            self.allocator.free(entry.offset)
        if evicted:
            self.num_evicted += 1
            self._ghosts[entry.key] = None
            if len(self._ghosts) > _MAX_GHOSTS:
                del self._ghosts[next(iter(self._ghosts))]

    def shrink(self, max_evictions: int) -> bool:
        """Evict, at most so many entries, while more is used than the budget allows; whether more can go."""
        num_evicted = 0
        for key in self.policy.victims():
            if self.allocator.used_bytes <= self.allocator.budget_bytes:
                return False
            if num_evicted == max_evictions:
                return True
            entry = self.entries[key]
            if entry.state is State.READY and not entry.leases and not entry.num_children:
                self.drop(entry, evicted=True)
                self.num_evicted_for_budget += 1
                num_evicted += 1
        return num_evicted > 0  # then their parents can go, which this walk passed over

    def unlease(self, entry: Entry) -> None:
        """One lease less. Nobody who held it touches the slot any more."""
        entry.leases -= 1
        if entry.leases == 0 and entry.state is State.DROPPED:
            self.allocator.free(entry.offset)

    def touch(self, chain: Iterable[Entry]) -> None:
        """A chain of entries was used. Its end is touched first, so that it goes first."""
        for entry in reversed(list(chain)):
            if entry.state is not State.DROPPED:
                self.policy.touched(entry.key)

    def why_missing(self, chunk_hash: bytes, shard: int) -> MissReason:
        """Why L1 does not hold a shard, as far as it remembers."""
        if entry_key(chunk_hash, shard) in self._ghosts:
            return MissReason.EVICTED
        return MissReason.ABSENT

    def of_namespace(self, namespace: Namespace | None) -> list[Entry]:
        """The entries of a namespace, or all."""
        return [e for e in self.entries.values() if namespace is None or e.namespace is namespace]
