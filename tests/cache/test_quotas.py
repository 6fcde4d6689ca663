"""Quotas of salts in L1: who goes for whom, what is refused, and what a miss says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstrata.cache.cache import Cache
from kvstrata.cache.index import Entry, Index, State
from kvstrata.config import DEFAULT_QUOTA, QuotaConfig
from kvstrata.errors import NotFoundError, OperationError, TierUnavailable
from kvstrata.frame import HEADER_BYTES
from kvstrata.hashing import salt_id
from kvstrata.memory.pool import SlotAllocator
from kvstrata.policies.lru import LRUPolicy
from kvstrata.policies.s3fifo import S3FIFOPolicy
from kvstrata.quotas import Quota, Usage
from kvstrata.testing.client import CHUNK_SIZE, Prompt, make_namespace, payload_of, prompt
from kvstrata.testing.core import frame_bytes, open_core, settle, store, wait_lookup
from kvstrata.tiers.dict import DictTier
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.types import MissReason, Piece

SPACE = make_namespace()
SLOT = -(-frame_bytes(SPACE, CHUNK_SIZE) // 4096) * 4096
POOL_CHUNKS = 10


def chunk(number: int, salt: str) -> Prompt:
    """One chunk, unlike any other."""
    return prompt(CHUNK_SIZE, number, SPACE, salt)


def put(cache: Cache, *stored: Prompt) -> int:
    """Store; how many pieces got a slot."""
    namespace = cache.intern(SPACE)
    return sum(len(store(cache, "o", namespace, 0, each.pieces, payload_of)) for each in stored)


def held(cache: Cache, *asked: Prompt) -> list[bool]:
    return [cache.index.get(each.pieces[0].chunk_hash, 0) is not None for each in asked]


def why(cache: Cache, asked: Prompt) -> MissReason | None:
    hit = wait_lookup(cache, "o", "r", cache.intern(SPACE), asked.prefix)
    cache.release("o", "r")
    return hit.miss_reason


def quota(name: str, *, reserved: int = 0, limit: int | None = None, salt: str | None = None) -> QuotaConfig:
    amounts = Quota(reserved * SLOT, None if limit is None else limit * SLOT)
    return QuotaConfig(name=name, salt=salt, tiers={"l1": amounts})


@pytest.fixture(params=[LRUPolicy, S3FIFOPolicy])
def policy(request: pytest.FixtureRequest) -> LRUPolicy | S3FIFOPolicy:
    return request.param()


def chunks(salt: str, numbers: Sequence[int]) -> list[Prompt]:
    return [chunk(number, salt) for number in numbers]


def test_a_salt_never_holds_more_than_its_limit_and_its_oldest_go_first(policy: LRUPolicy) -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT, policy=policy) as cache:
        cache.quotas.put(quota("acme", limit=3))
        others = chunks("", range(5))
        put(cache, *others)
        own = chunks("acme", range(5))
        assert put(cache, *own[:3]) == 3
        assert why(cache, own[0]) is None  # a use
        assert put(cache, *own[3:]) == 2
        assert held(cache, *own) == [True, False, False, True, True]
        assert held(cache, *others) == [True] * 5, "though they are older"
        assert why(cache, own[1]) is MissReason.SALT_QUOTA
        (row,) = cache.quotas.report()
        assert (row.name, row.tier, row.used_bytes, row.num_entries, row.num_evicted) == (
            "acme", "l1", 3 * SLOT, 3, 2
        )  # fmt: skip
        assert cache.l1_stats()["limit_evictions"] == 2


def test_what_is_reserved_is_not_evicted_by_others(policy: LRUPolicy) -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT, policy=policy) as cache:
        cache.quotas.put(quota("acme", reserved=3))
        own = chunks("acme", range(5))
        put(cache, *own)
        for number in range(40):  # a load many times as large as L1
            put(cache, chunk(number, "noisy"))
        kept = held(cache, *own)
        assert sum(kept) == 3
        if isinstance(policy, LRUPolicy):
            assert kept == [False, False, True, True, True], "its own oldest were beyond the reserve"
        (row,) = cache.quotas.report()
        assert row.used_bytes == row.reserved_bytes == 3 * SLOT
        put(cache, *chunks("acme", range(5, 9)))
        assert cache.quotas.report()[0].num_entries > 3, "and grows again, at the cost of those without quota"


def test_parked_entries_go_first_once_they_are_not_reserved(policy: LRUPolicy) -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT, policy=policy) as cache:
        cache.quotas.put(quota("acme", reserved=3))
        own = chunks("acme", range(3))
        put(cache, *own, *chunks("noisy", range(20)))
        assert cache.index.accounts.num_parked == 3
        cache.quotas.put(quota("acme", reserved=1))
        put(cache, *chunks("noisy", range(20, 22)))
        assert held(cache, *own) == [False, False, True]
        assert why(cache, own[2]) is None
        assert cache.index.accounts.num_parked == 0, "what is used takes part in the order again"
        cache.quotas.remove("acme")
        put(cache, *chunks("noisy", range(22, 60)))
        assert held(cache, own[2]) == [False]


def test_what_was_reserved_is_found_after_the_last_quota_has_ended(policy: LRUPolicy) -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT, policy=policy) as cache:
        cache.quotas.put(quota("acme", reserved=3))
        own = chunks("acme", range(3))
        put(cache, *own, *chunks("noisy", range(20)))
        assert cache.index.accounts.num_parked == 3
        cache.quotas.remove("acme")
        assert [why(cache, each) for each in own] == [None] * 3
        assert cache.index.accounts.is_empty


def test_what_reserves_of_others_leave_no_room_for_is_refused_and_says_why() -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT) as cache:
        cache.quotas.put(quota("a", reserved=5), quota("b", reserved=5))
        a, b = chunks("a", range(5)), chunks("b", range(5))
        assert put(cache, *a, *b) == 10
        late = chunk(1, "other")
        assert put(cache, late) == 0
        assert why(cache, late) is MissReason.SALT_QUOTA
        explanation = cache.explain("r")
        assert explanation is not None
        assert "quota" in explanation.detail
        assert cache.metrics.totals()["misses"]["salt_quota"] == 1
        assert cache.metrics.totals()["stores_dropped"] == 1
        assert put(cache, chunk(9, "a")) == 1, "its own oldest make room"
        assert held(cache, *a) == [False, True, True, True, True]
        assert held(cache, *b) == [True] * 5


def test_a_continuation_counts_for_its_salt_although_its_prefix_was_refused() -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT) as cache:
        cache.quotas.put(quota("acme", limit=2))
        long = prompt(6 * CHUNK_SIZE, 1, SPACE, "acme")
        namespace = cache.intern(SPACE)
        slots = cache.reserve("o", namespace, 0, long.pieces)  # all at once: none of them can go
        assert [slot is not None for slot in slots] == [True, True, False, False, False, False]
        cache.commit("o", 0, [piece.chunk_hash for piece in long.pieces[:2]])
        hit = cache.lookup("o", "r", namespace, long.prefix)
        assert (hit.num_tokens, hit.miss_reason) == (2 * CHUNK_SIZE, MissReason.SALT_QUOTA)
        assert cache.reserve("o", namespace, 0, long.pieces[4:]) == [None, None], "the hit is in use"
        cache.release("o", "r")
        assert cache.quotas.report()[0].used_bytes == 2 * SLOT


def test_loading_back_keeps_the_limit_and_says_why_it_ends() -> None:
    tier = DictTier()
    with open_core([tier], pool_bytes=POOL_CHUNKS * SLOT) as cache:
        long = prompt(6 * CHUNK_SIZE, 1, SPACE, "acme")
        put(cache, long)
        settle(cache)
        cache.clear(tiers=False)
        cache.quotas.put(quota("acme", limit=2))
        hit = wait_lookup(cache, "o", "r", cache.intern(SPACE), long.prefix)
        assert (hit.num_tokens, hit.miss_reason) == (2 * CHUNK_SIZE, MissReason.SALT_QUOTA)
        assert cache.quotas.report()[0].used_bytes == 2 * SLOT


def test_a_disk_keeps_quotas_too_and_knows_whose_files_are_after_a_restart(tmp_path: Path) -> None:
    frame = HEADER_BYTES + SPACE.layout.payload_bytes(CHUNK_SIZE)
    acme = QuotaConfig(name="acme", tiers={"tier0": Quota(3 * frame, 4 * frame)})
    options = DiskOptions(path=str(tmp_path), max_bytes=6 * frame)
    with open_core([DiskTier(options)], pool_bytes=POOL_CHUNKS * SLOT) as cache:
        put(cache, *chunks("acme", range(5)))
        settle(cache)
    disk = DiskTier(options)
    with open_core([disk], pool_bytes=POOL_CHUNKS * SLOT) as cache:
        cache.quotas.put(acme)
        (row,) = cache.quotas.report()
        assert (row.tier, row.num_entries, row.used_bytes) == ("tier0", 4, 4 * frame)
        put(cache, *chunks("noisy", range(8)))
        settle(cache)
        assert disk.usage(salt_id("acme")).num_entries == 3
        cache.clear(tiers=False)
        assert [why(cache, each) for each in chunks("acme", range(5))].count(None) == 3
        assert disk.usage(salt_id("acme")).num_entries == 3, "loading them has not changed whose they are"


def test_a_disk_that_cannot_delete_leaves_all_quotas_as_they_were(tmp_path: Path) -> None:
    frame = HEADER_BYTES + SPACE.layout.payload_bytes(CHUNK_SIZE)
    disks = [DiskTier(DiskOptions(path=str(tmp_path / name), max_bytes=6 * frame)) for name in "ab"]

    def limits(number: int) -> QuotaConfig:
        amounts = {"l1": Quota(limit_bytes=number * SLOT)}
        amounts |= {name: Quota(limit_bytes=number * frame) for name in ("tier0", "tier1")}
        return QuotaConfig(name="acme", tiers=amounts)

    with open_core(disks, pool_bytes=POOL_CHUNKS * SLOT) as cache:
        cache.quotas.put(limits(4))
        own = chunks("acme", range(4))
        put(cache, *own)
        settle(cache)
        file = next((tmp_path / "b").rglob("*.kv"))
        for each in (tmp_path / "b").rglob("*.kv"):
            each.unlink()
            each.mkdir()  # nobody, root included, can delete it as a file
        with pytest.raises(TierUnavailable):
            cache.quotas.put(limits(1))
        assert cache.quotas.configs() == [limits(4)]
        assert [row.limit_bytes for row in cache.quotas.report()] == [4 * SLOT, 4 * frame, 4 * frame]
        assert held(cache, *own) == [True] * 4, "L1 has not begun"
        assert put(cache, *chunks("acme", range(4, 6))) == 2
        settle(cache)
        assert disks[0].usage(salt_id("acme")).used_bytes == 3 * frame, "one was left, and two were added"
        assert file.is_dir()
        cache.quotas.remove("acme")
        assert cache.quotas.configs() == []


def test_a_first_limit_gives_the_lock_away_while_it_orders_what_is_held() -> None:
    """Uses and stores come in between, and the oldest go first all the same."""
    index = Index(SlotAllocator(5000 * SLOT), LRUPolicy())

    def add(number: int) -> Entry:
        piece = Piece(number.to_bytes(32, "big"), bytes(32), 0, CHUNK_SIZE, salt_id=salt_id("acme"))
        entry = index.insert(SPACE, piece, 0, State.WRITING)
        assert entry is not None
        entry.state = State.READY
        index.unlease(entry)
        return entry

    entries = [add(number) for number in range(4000)]
    steps = index.change_quotas({salt_id("acme"): Quota(limit_bytes=3 * SLOT)}, None)
    next(steps)
    assert len(index.accounts.of(salt_id("acme")).order or ()) == 0
    next(steps)
    index.touch([entries[0]])  # has not been placed yet
    index.touch([entries[-1]])
    for entry in (entries[2], entries[-3]):
        index.drop(entry)
    late = add(9999)
    num_steps = sum(1 for _ in steps)
    assert num_steps > 10
    assert list(index.entries.values()) == [entries[0], entries[-1], late]
    assert list(index.accounts.of(salt_id("acme")).order or ()) == [e.key for e in index.entries.values()]


def test_a_quota_without_a_limit_looks_at_no_entry() -> None:
    class Unlooked(dict[bytes, Entry]):
        def values(self):
            raise AssertionError("all entries were walked over")

    index = Index(SlotAllocator(10 * SLOT), LRUPolicy())
    index.insert(SPACE, Piece(bytes(32), bytes(32), 0, CHUNK_SIZE, salt_id=salt_id("acme")), 0, State.READY)
    index.entries = Unlooked(index.entries)
    assert list(index.change_quotas({salt_id("acme"): Quota(reserved_bytes=SLOT)}, None)) == []
    assert index.accounts.usage(salt_id("acme")) == Usage(1, SLOT)
    assert list(index.change_quotas({}, None)) == []


def test_leases_outlive_a_lowered_limit() -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT) as cache:
        own = chunks("acme", range(4))
        put(cache, *own)
        namespace = cache.intern(SPACE)
        assert cache.lookup("o", "r", namespace, own[0].prefix).num_tokens
        cache.quotas.put(quota("acme", limit=0))
        assert held(cache, *own) == [True, False, False, False]
        assert put(cache, chunk(9, "acme")) == 0
        cache.release("o", "r")
        cache.quotas.put(quota("acme", limit=0))
        assert len(cache.index) == 0


def test_the_default_is_for_each_other_salt() -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT) as cache:
        cache.quotas.put(quota(DEFAULT_QUOTA, limit=2), quota("big", limit=5))
        salts = ("one", "two", "big", "")
        for salt in salts:
            put(cache, *chunks(salt, range(3)))
        assert [sum(held(cache, *chunks(salt, range(3)))) for salt in salts] == [2, 2, 3, 3]
        rows = {row.name: row for row in cache.quotas.report()}
        assert rows[DEFAULT_QUOTA].num_entries == 4
        assert rows["big"].num_entries == 3
        cache.clear()
        assert [account.salt_id for account in cache.index.accounts.all()] == [salt_id("big")], (
            "the others are forgotten"
        )


def test_an_empty_salt_stands_for_requests_without_one() -> None:
    with open_core(pool_bytes=POOL_CHUNKS * SLOT) as cache:
        cache.quotas.put(quota("unsalted", salt="", limit=1))
        put(cache, *chunks("", range(3)), *chunks("acme", range(3)))
        assert (held(cache, *chunks("", range(3))), held(cache, *chunks("acme", range(3)))) == (
            [False, False, True],
            [True, True, True],
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([quota("a", reserved=6), quota("b", reserved=5)], "would be reserved"),
        ([quota("a", reserved=3, limit=2)], "more is reserved than the limit"),
        ([quota(DEFAULT_QUOTA, reserved=1)], "nothing can be reserved"),
        ([quota(DEFAULT_QUOTA, limit=1, salt="x")], "for all salts without a quota"),
        ([quota("a", salt="s"), quota("b", salt="s")], "'a' is for the same salt"),
        ([QuotaConfig(name="a", tiers={"disk": Quota()})], "there is no tier 'disk'"),
        ([QuotaConfig(name="a", tiers={"tier0": Quota()})], "tier tier0 keeps no quotas"),
    ],
)
def test_what_cannot_be_kept_is_refused_as_a_whole(wrong: list[QuotaConfig], message: str) -> None:
    with open_core([DictTier()], pool_bytes=POOL_CHUNKS * SLOT) as cache:
        with pytest.raises(OperationError, match=message) as raised:
            cache.quotas.put(*wrong)
        assert "'s'" not in str(raised.value)
        assert cache.quotas.configs() == []
        assert cache.index.accounts.is_empty
        with pytest.raises(NotFoundError):
            cache.quotas.remove("a")


def test_no_entry_is_looked_at_twice_for_what_others_reserve() -> None:
    """A thousand reserved entries in front of the order cost one look each, not one per store."""

    class Counted(LRUPolicy):
        looks = 0

        def victims(self):
            for key in super().victims():
                Counted.looks += 1
                yield key

    index = Index(SlotAllocator(1100 * SLOT), Counted())
    list(index.change_quotas({salt_id("acme"): Quota(reserved_bytes=1000 * SLOT)}, None))
    for number in range(3100):
        name = number.to_bytes(32, "big")
        salt = "acme" if number < 1000 else "noisy"
        piece = Piece(name, bytes(32), 0, CHUNK_SIZE, salt_id=salt_id(salt))
        entry = index.insert(SPACE, piece, 0, State.WRITING)
        assert entry is not None
        entry.state = State.READY
        index.unlease(entry)
    assert sum(entry.salt_id == salt_id("acme") for entry in index.entries.values()) == 1000
    assert Counted.looks <= 1000 + 2 * 2000
