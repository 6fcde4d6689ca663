"""L1's index with quotas as a state machine: what one salt holds is never more than its limit, never less than its
reserve because of another, and leases, prefixes and the budget are respected all the while.

All slots have one size, so that what can be had does not depend on where they lie.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstrata.cache.index import Entry, Index, State
from kvstrata.frame import HEADER_BYTES, MAX_GROWTH_BYTES
from kvstrata.memory.pool import SlotAllocator
from kvstrata.policies.lru import LRUPolicy
from kvstrata.policies.s3fifo import S3FIFOPolicy
from kvstrata.quotas import Quota
from kvstrata.types import KVLayout, MissReason, Namespace, Piece

SLOT = 4096
NUM_SLOTS = 10
LAYOUT = KVLayout(
    block_size=1, page_bytes=(SLOT - HEADER_BYTES - MAX_GROWTH_BYTES,), dtype="uint8", kernel_format="test"
)
SPACE = Namespace("vllm", "m", "fp", "auto", 1, "tp1", 1, LAYOUT)
SALTS = (*(name * 16 for name in (b"a", b"b", b"c", b"d")), b"")
salts = st.sampled_from(SALTS)
END = object()
picks = st.integers(0, 1000)
# Hypothesis draws small numbers often: reserves of nothing and limits of nothing among them.
quotas = st.builds(
    lambda reserved, limit: Quota(reserved * SLOT, None if limit is None else max(reserved, limit) * SLOT),
    st.integers(0, 4),
    st.none() | st.integers(0, 6),
)


class WatchedIndex(Index):
    """Checks what is evicted, and for whom."""

    inserting: bytes | None = None

    def held_bytes(self, salt_id: bytes) -> int:
        return SLOT * sum(entry.salt_id == salt_id for entry in self.entries.values())

    def drop(self, entry: Entry, *, evicted: bool = False) -> None:
        if evicted:
            assert entry.leases == 0
            assert not any(other.parent == entry.key for other in self.entries.values())
            if entry.salt_id != self.inserting:
                reserved_bytes = self.accounts.of(entry.salt_id).quota.reserved_bytes
                assert self.held_bytes(entry.salt_id) - SLOT >= reserved_bytes
        super().drop(entry, evicted=evicted)


class Quotas(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from([LRUPolicy, S3FIFOPolicy]), first=st.dictionaries(salts, quotas, max_size=4)
    )
    def open(self, policy: type[LRUPolicy], first: dict[bytes, Quota]) -> None:
        self.index = WatchedIndex(SlotAllocator(NUM_SLOTS * SLOT), policy())
        self.quotas: dict[bytes, Quota] = {}
        self.default: Quota | None = None
        self.leased: list[Entry] = []
        self.names = iter(range(1 << 30))
        self.changing: Generator[None, None, None] | None = None
        self.changed: bytes | None = None
        for salt_id, quota in first.items():
            self.set_quota(salt_id, quota)
        self.end_change()

    def limit(self, salt_id: bytes) -> int | None:
        """What is in force now."""
        if self.changing is not None:
            return self.index.accounts.of(salt_id).quota.limit_bytes
        quota = self.quotas.get(salt_id, self.default if salt_id else None)
        return None if quota is None else quota.limit_bytes

    @rule(salt_id=salts, parent=st.none() | picks, keep_lease=st.booleans())
    def insert(self, salt_id: bytes, parent: int | None, keep_lease: bool) -> None:
        own = [entry for entry in self.index.entries.values() if entry.salt_id == salt_id]
        before = None if parent is None or not own else own[parent % len(own)]
        name = next(self.names).to_bytes(32, "big")
        first = before.first_token + 1 if before else 0
        piece = Piece(name, before.chunk_hash if before else bytes(32), first, 1, salt_id=salt_id)
        is_beyond = self.index.allocator.used_bytes > self.index.allocator.budget_bytes
        self.index.inserting = salt_id
        entry = self.index.insert(SPACE, piece, 0, State.WRITING)
        self.index.inserting = None
        limit = self.limit(salt_id)
        if entry is None:
            if (
                not is_beyond
            ):  # then one eviction is not enough, and a walk does not return to prefixes it passed
                self.check_refusal(salt_id, before, name)
            return
        assert limit is None or self.index.accounts.of(salt_id).used_bytes <= limit
        entry.state = State.READY
        if keep_lease:
            self.leased.append(entry)
        else:
            self.index.unlease(entry)

    def check_refusal(self, salt_id: bytes, before: Entry | None, name: bytes) -> None:
        """Nothing that may go was left."""
        event("refused")
        free = [entry for entry in self.index.entries.values() if entry.is_free and entry is not before]
        limit, account = self.limit(salt_id), self.index.accounts.of(salt_id)
        own = [entry for entry in free if entry.salt_id == salt_id]
        reason = self.index.why_missing(name, 0)
        if limit is not None and account.used_bytes + SLOT > limit:
            assert not own or limit < SLOT
            assert reason is MissReason.SALT_QUOTA
            return
        assert not own
        reserved = [e for e in free if self.index.accounts.of(e.salt_id).protects(SLOT)]
        assert reserved == free
        if reserved:
            event("others' reserve is all that is left")
            assert reason is MissReason.SALT_QUOTA

    @rule(pick=picks)
    def lease(self, pick: int) -> None:
        entries = list(self.index.entries.values())
        if entries:
            entry = entries[pick % len(entries)]
            entry.leases += 1
            self.leased.append(entry)
            self.index.touch([entry])

    @rule(pick=picks)
    def unlease(self, pick: int) -> None:
        if self.leased:
            self.index.unlease(self.leased.pop(pick % len(self.leased)))

    @rule(pick=picks)
    def touch(self, pick: int) -> None:
        entries = list(self.index.entries.values())
        if entries:
            self.index.touch([entries[pick % len(entries)]])

    @rule(pick=picks)
    def drop(self, pick: int) -> None:
        entries = list(self.index.entries.values())
        if entries:
            self.index.drop(entries[pick % len(entries)])

    @rule(salt_id=salts, quota=st.none() | quotas)
    def set_quota(self, salt_id: bytes, quota: Quota | None) -> None:
        self.end_change()
        changed = {name: each for name, each in self.quotas.items() if name != salt_id}
        if quota is not None:
            changed[salt_id] = quota
        if sum(each.reserved_bytes for each in changed.values()) > self.index.allocator.budget_bytes:
            return  # refused above the index
        self.quotas = changed
        self.apply(salt_id)

    @rule(limit=st.none() | st.integers(0, 4))
    def set_default(self, limit: int | None) -> None:
        self.end_change()
        self.default = None if limit is None else Quota(limit_bytes=limit * SLOT)
        self.apply(None)

    def apply(self, salt_id: bytes | None) -> None:
        self.changing, self.changed = self.index.change_quotas(self.quotas, self.default), salt_id

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        """A part of a change; whatever comes next finds it half done."""
        self.index.inserting = self.changed
        for _ in range(num_steps):
            if self.changing is not None and next(self.changing, END) is END:
                self.changing = None
                self.check_limits()
        self.index.inserting = None

    @rule()
    def end_change(self) -> None:
        while self.changing is not None:
            self.step(1)

    def check_limits(self) -> None:
        for account in self.index.accounts.all():
            limit = self.limit(account.salt_id)
            assert account.quota.limit_bytes == limit
            if limit is not None and account.used_bytes > limit:
                assert not any(e.is_free for e in self.index.entries.values() if e.salt_id == account.salt_id)

    @rule(slots=st.integers(4, NUM_SLOTS))
    def resize(self, slots: int) -> None:
        if slots * SLOT < sum(each.reserved_bytes for each in self.quotas.values()):
            return  # refused above the index
        self.index.allocator.budget_bytes = slots * SLOT
        while self.index.shrink(2):
            pass

    @invariant()
    def accounts_add_up(self) -> None:
        if not hasattr(self, "index"):
            return
        index, entries = self.index, self.index.entries
        parked = [key for account in index.accounts.all() for key in account.parked]
        assert len(parked) == index.accounts.num_parked
        ordered = list(index.policy.victims())
        assert sorted([*parked, *ordered]) == sorted(entries), "each is parked or in the order, and once"
        leaving = {id(e): e for e in self.leased if e.state is State.DROPPED}.values()
        for account in index.accounts.all():
            held = [key for key, e in entries.items() if index.accounts.of(e.salt_id) is account]
            gone = [e for e in leaving if index.accounts.of(e.salt_id) is account]
            assert (account.num_entries, account.held_bytes) == (len(held), SLOT * len(held))
            assert account.used_bytes == SLOT * (len(held) + len(gone))
            assert set(account.parked) <= set(held)
            if self.changing is None:
                assert (account.order is None) == (account.quota.limit_bytes is None)
                assert account.order is None or sorted(account.order) == sorted(held)
            else:
                assert set(account.order or ()) <= set(held)

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        self.end_change()
        for entry in self.leased:
            self.index.unlease(entry)
        for entry in list(self.index.entries.values()):
            with contextlib.suppress(KeyError):
                self.index.drop(entry)
        assert self.index.allocator.num_slots == 0
        assert self.index.accounts.num_parked == 0
        assert all(account.used_bytes == 0 for account in self.index.accounts.all())
        assert all(account.is_named for account in self.index.accounts.all())


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten entries, as in the application of thousands."""
    monkeypatch.setattr("kvstrata.cache.index._ENTRIES_AT_ONCE", 2)
    monkeypatch.setattr("kvstrata.cache.index._EVICTIONS_AT_ONCE", 2)


TestQuotas = Quotas.TestCase
TestQuotas.settings = settings(
    max_examples=int(os.environ.get("KVSTRATA_TEST_EXAMPLES", "60")),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
