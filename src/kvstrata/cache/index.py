"""What L1 holds: a pure state machine. No I/O, no lock, no clock of its own; ``cache.Cache`` guards it.

    reserve ──> WRITING ──commit──> READY ──evict, delete──> freed
    prefetch ─> LOADING ──loaded──> READY
    any of them ──dropped while leased──> DROPPED ──last lease ends──> freed

A slot holds one frame: a header of ``HEADER_BYTES``, then the payload, so that a frame goes to and comes from
a tier without a copy; behind it is room for what a codec may add. Only READY entries without a lease and without
a child in L1 are evicted, so that tails and the ends of chains go before the prefixes that they depend on. A slot
is never freed under a lease. Whose entry goes for whose also depends on the quotas of their salts (``quotas``).
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping

import msgspec

from kvstrata.frame import room_bytes
from kvstrata.memory.pool import SlotAllocator, slot_bytes
from kvstrata.policies.base import EvictionPolicy
from kvstrata.policies.order import unoffered
from kvstrata.quotas import Account, Accounts, Quota
from kvstrata.types import MissReason, Namespace, Piece

_MAX_PASSED_OVER = 10_000
"""Victims that one allocation looks at; more means that nearly all of L1 is in use."""
_MAX_PARENTS_KEPT = 1000
"""Entries with continuations that keep their place in the order; beyond them it costs too much to pass over."""
_ENTRIES_AT_ONCE = 1000
_EVICTIONS_AT_ONCE = 256
"""In one step of what is done in steps: a millisecond or two."""
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
    salt_id: bytes = b""
    """Whose it is (``hashing.salt_id``)."""
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

    @property
    def is_free(self) -> bool:
        """Whether nobody needs it now, and nothing in L1 depends on it."""
        return self.state is State.READY and not self.leases and not self.num_children


class Index:
    """The entries of L1, their slots, and whose turn it is to go."""

    def __init__(self, allocator: SlotAllocator, policy: EvictionPolicy) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.allocator = allocator
        self.policy = policy
        self.num_evicted = 0
        self.num_evicted_for_budget = 0
        """Of those, the ones that went because the budget was lowered."""
        self.num_evicted_for_limit = 0
        """Of those, the ones that went for the limit of their own salt."""
        self.accounts: Accounts[bytes] = Accounts()
        self._leaving: dict[int, Entry] = {}
        """Entries that were dropped while leased, by their offsets."""
        self._ghosts: dict[bytes, MissReason] = {}
        self._awaited: dict[bytes, int] = {}
        """Parents that are not held -> how many held entries wait for them. They come before their time when a
        tier has lost the parent, or delivers it last."""

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, chunk_hash: bytes, shard: int) -> Entry | None:
        return self.entries.get(entry_key(chunk_hash, shard))

    def insert(
        self, namespace: Namespace, piece: Piece, shard: int, state: State, *, salt_id: bytes = b""
    ) -> Entry | None:
        """A new entry with a slot and one lease, evicting as needed; None when there is no room for it now.

        The key must not be held. ``salt_id`` says whose it is, where the piece does not; ``why_missing`` why there
        is no room.
        """
        key = entry_key(piece.chunk_hash, shard)
        size = slot_bytes(room_bytes(namespace.layout.payload_bytes(piece.num_tokens)))
        before = None if piece.first_token == 0 else self.get(piece.parent_hash, shard)
        parent, salt_id = self._origin(piece, shard, before, piece.salt_id or salt_id)
        # First, so that the parent is not the victim that makes room for its child.
        self._add_child(parent, 1)
        offset = self._allocate(size, salt_id)
        if offset is None:
            self._add_child(parent, -1)
            self._refused(key, salt_id)
            return None
        entry = Entry(key, namespace, piece.first_token, piece.num_tokens, offset, state, parent, salt_id)
        entry.num_children = self._awaited.pop(key, 0)
        entry.leases = 1
        self.entries[key] = entry
        self._ghosts.pop(key, None)
        self.policy.added(key, size)
        self.accounts.take(salt_id, size)
        self.accounts.added(salt_id, key, size)
        return entry

    @staticmethod
    def _origin(piece: Piece, shard: int, before: Entry | None, salt_id: bytes) -> tuple[bytes | None, bytes]:
        """The parent's key and the salt's id; one object for both entries where they agree: it counts, a million
        times."""
        if piece.first_token == 0:
            return None, salt_id
        if before is None:
            return entry_key(piece.parent_hash, shard), salt_id
        return before.key, before.salt_id if before.salt_id == salt_id else salt_id

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

    def _allocate(self, size: int, salt_id: bytes) -> int | None:
        account = self.accounts.of(salt_id)
        if size > self.allocator.budget_bytes or not self._fits_limit(account, size):
            return None
        offset = self.allocator.allocate(size)
        if offset is None:
            for entry in self._victims(account):
                self.drop(entry, evicted=True)
                offset = self.allocator.allocate(size)
                if offset is not None:
                    break
        return offset

    def _fits_limit(self, account: Account[bytes], size: int, max_evictions: int = _MAX_PASSED_OVER) -> bool:
        """Evict what an account used longest ago, at most so many entries, until ``size`` bytes more are within its
        limit; whether they are."""
        limit, order = account.quota.limit_bytes, account.order
        if limit is None or order is None or account.excess_bytes(size) <= 0:
            return True
        if size > limit:
            return False
        offered: set[bytes] = set()
        for key in itertools.islice(unoffered(order, offered), _MAX_PASSED_OVER):
            offered.add(key)
            entry = self.entries[key]
            if entry.is_free:
                self.drop(entry, evicted=True)
                self._remember(key, MissReason.SALT_QUOTA)
                self.num_evicted_for_limit += 1
                account.num_evicted += 1
                max_evictions -= 1
            if account.excess_bytes(size) <= 0:
                return True
            if not max_evictions:
                break
        return False

    def _victims(self, account: Account[bytes] | None) -> Iterator[Entry]:
        """What may go to make room for ``account``, in that order. The caller drops each, or stops."""
        yield from self._released()
        for passed, key in enumerate(itertools.islice(self.policy.victims(), _MAX_PASSED_OVER)):
            entry = self.entries[key]
            if entry.num_children and passed < _MAX_PARENTS_KEPT:
                continue  # its continuations come later in the order, and go first
            if not entry.is_free:
                self.policy.touched(key)
            elif not self._park(entry):
                yield entry
        if account is not None:
            # All that is left is others' reserve; what is its own may go.
            for key in unoffered(account.parked, ()):
                if self._is_free_or_unparked(account, key):
                    yield self.entries[key]

    def _released(self) -> Iterator[Entry]:
        """Entries that were parked and are reserved no more."""
        for account, key in self.accounts.releasing():
            if self._is_free_or_unparked(account, key):
                yield self.entries[key]

    def _park(self, entry: Entry) -> bool:
        """Take an entry out of the order of eviction, if it is reserved."""
        account = self.accounts.of(entry.salt_id)
        size = self.allocator.slot_bytes(entry.offset)
        if not account.protects(size):
            return False
        self.policy.removed(entry.key, evicted=True)
        self.accounts.park(account, entry.key, size)
        return True

    def _is_free_or_unparked(self, account: Account[bytes], key: bytes) -> bool:
        """Whether a parked entry can go; if not, as it is in use, it is put back in the order."""
        if self.entries[key].is_free:
            return True
        self.policy.added(key, account.parked[key])
        self.accounts.unpark(account, key)
        return False

    def drop(self, entry: Entry, *, evicted: bool = False) -> None:
        """Forget an entry. Its slot is freed now, or when its last lease ends."""
        del self.entries[entry.key]
        size = self.allocator.slot_bytes(entry.offset)
        if not self.accounts.removed(entry.salt_id, entry.key, size):
            self.policy.removed(entry.key, evicted=evicted)
        if entry.num_children:
            self._awaited[entry.key] = entry.num_children
        self._add_child(entry.parent, -1)
        entry.state = State.DROPPED
        if entry.leases:
            self._leaving[entry.offset] = entry
        else:
            self._free(entry, size)
        if evicted:
            self.num_evicted += 1
            self._remember(entry.key, MissReason.EVICTED)

    def _free(self, entry: Entry, size: int) -> None:
        self.allocator.free(entry.offset)
        self.accounts.give_back(entry.salt_id, size)

    def _refused(self, key: bytes, salt_id: bytes) -> None:
        """There was no room for an entry; remember it if that was for quotas."""
        account = self.accounts.of(salt_id)
        if account.excess_bytes(1) > 0 or self.accounts.num_parked > len(account.parked):
            account.num_refused += 1
            self._remember(key, MissReason.SALT_QUOTA)

    def _remember(self, key: bytes, reason: MissReason) -> None:
        self._ghosts[key] = reason
        if len(self._ghosts) > _MAX_GHOSTS:
            del self._ghosts[next(iter(self._ghosts))]

    def shrink(self, max_evictions: int) -> bool:
        """Evict, at most so many entries, while more is used than the budget allows; whether more can go."""
        num_evicted = 0
        for entry in itertools.chain(self._released(), self._unreserved()):
            if self.allocator.used_bytes <= self.allocator.budget_bytes:
                return False
            if num_evicted == max_evictions:
                return True
            self.drop(entry, evicted=True)
            self.num_evicted_for_budget += 1
            num_evicted += 1
        return num_evicted > 0  # then their parents can go, which this walk passed over

    def _unreserved(self) -> Iterator[Entry]:
        """All that can go, wherever it is in the order."""
        for key in self.policy.victims():
            entry = self.entries[key]
            if entry.is_free and not self._park(entry):
                yield entry

    # Quotas

    def change_quotas(
        self, quotas: Mapping[bytes, Quota], default: Quota | None
    ) -> Generator[None, None, None]:
        """Have these quotas, by the ids of their salts, and evict what they do not allow.

        A step at a time: between two of them others may use the index. A limit that is the first of its salt walks
        over all entries, and holds after that; what nobody uses meanwhile is ordered by when it was stored.
        """
        entries = list(self.entries.values()) if self.accounts.prepare(quotas, default) else []
        while entries:
            yield
            for entry in reversed(entries[-_ENTRIES_AT_ONCE:]):
                if entry.state is not State.DROPPED:
                    self.accounts.place(entry.salt_id, entry.key)
            del entries[-_ENTRIES_AT_ONCE:]
        self.accounts.change(quotas, default)
        limited = [account for account in self.accounts.all() if account.order is not None]
        for number, account in enumerate(limited):
            while self._keep_limit(account, _EVICTIONS_AT_ONCE):
                yield
            if number % _ENTRIES_AT_ONCE == 0:
                yield

    def _keep_limit(self, account: Account[bytes], max_evictions: int) -> bool:
        """Evict, at most so many entries, what an account holds beyond its limit; whether more can go."""
        before = account.num_evicted
        self._fits_limit(account, 0, max_evictions)
        return account.num_evicted > before

    def unlease(self, entry: Entry) -> None:
        """One lease less. Nobody who held it touches the slot any more."""
        entry.leases -= 1
        if entry.leases == 0 and entry.state is State.DROPPED:
            del self._leaving[entry.offset]
            self._free(entry, self.allocator.slot_bytes(entry.offset))

    def touch(self, chain: Iterable[Entry]) -> None:
        """A chain of entries was used. Its end is touched first, so that it goes first."""
        for entry in reversed(list(chain)):
            if entry.state is State.DROPPED:
                continue
            if not self.accounts.is_empty and self.accounts.touched(entry.salt_id, entry.key):
                self.policy.added(entry.key, self.allocator.slot_bytes(entry.offset))
            else:
                self.policy.touched(entry.key)

    def why_missing(self, chunk_hash: bytes, shard: int) -> MissReason:
        """Why L1 does not hold a shard, as far as it remembers."""
        return self._ghosts.get(entry_key(chunk_hash, shard), MissReason.ABSENT)
