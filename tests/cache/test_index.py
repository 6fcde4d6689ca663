"""Order of eviction, leases and slots of the index."""

from __future__ import annotations

import pytest

from kvstrata.cache.index import Entry, Index, State, entry_key
from kvstrata.frame import HEADER_BYTES, MAX_GROWTH_BYTES
from kvstrata.memory.pool import SlotAllocator
from kvstrata.policies.base import EvictionPolicy
from kvstrata.policies.lru import LRUPolicy
from kvstrata.policies.s3fifo import S3FIFOPolicy
from kvstrata.types import KVLayout, MissReason, Namespace, Piece

SLOT = 4096
PAGE = SLOT - HEADER_BYTES - MAX_GROWTH_BYTES
LAYOUT = KVLayout(block_size=16, page_bytes=(PAGE,), dtype="bfloat16", kernel_format="test")
SPACE = Namespace("vllm", "m", "fp", "auto", 1, "tp1", 16, LAYOUT)


def piece(name: str, parent: str = "") -> Piece:
    return Piece(name.encode().ljust(32), parent.encode().ljust(32), 16 if parent else 0, 16)


def ready(index: Index, name: str, parent: str = "") -> Entry:
    entry = index.insert(SPACE, piece(name, parent), 0, State.WRITING)
    assert entry is not None
    entry.state = State.READY
    index.unlease(entry)
    return entry


def names(index: Index) -> set[str]:
    return {key[:-2].decode().strip() for key in index.entries}


@pytest.fixture(params=[LRUPolicy, S3FIFOPolicy])
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return request.param()


@pytest.fixture
def index(policy: EvictionPolicy) -> Index:
    return Index(SlotAllocator(4 * SLOT), policy)


def test_the_oldest_goes_first() -> None:
    index = Index(SlotAllocator(4 * SLOT), LRUPolicy())
    for name in "abcd":
        ready(index, name)
    index.touch([index.entries[piece("a").chunk_hash + b"\0\0"]])
    ready(index, "e")
    assert names(index) == set("acde")
    assert index.num_evicted == 1
    assert index.why_missing(piece("b").chunk_hash, 0) == MissReason.EVICTED
    assert index.why_missing(piece("z").chunk_hash, 0) == MissReason.ABSENT


def test_what_is_stored_again_was_not_evicted(index: Index) -> None:
    for name in "abcde":
        ready(index, name)
    (gone,) = set("abcde") - names(index)
    entry = ready(index, gone)
    index.drop(entry)
    assert index.why_missing(piece(gone).chunk_hash, 0) == MissReason.ABSENT


def test_ends_of_chains_go_before_what_they_depend_on(index: Index) -> None:
    for name, parent in (("1", ""), ("2", "1"), ("3", "2"), ("4", "3")):
        ready(index, name, parent)
    for number, expected in ((5, "1235"), (6, "1256"), (7, "1567")):
        ready(index, str(number), str(number - 1) if number > 5 else "")
        assert names(index) == set(expected)


def test_a_parent_does_not_make_room_for_its_child(index: Index) -> None:
    ready(index, "1")
    held = [ready(index, name) for name in "abc"]
    for entry in held:
        entry.leases += 1
    assert index.insert(SPACE, piece("2", "1"), 0, State.WRITING) is None
    assert "1" in names(index)
    ready(index, "x")  # without a parent it may
    assert names(index) == set("xabc")


@pytest.mark.parametrize("state", [State.WRITING, State.LOADING])
def test_what_is_in_use_stays(index: Index, state: State) -> None:
    leased = ready(index, "a")
    leased.leases += 1
    for name in "bc":
        busy = index.insert(SPACE, piece(name), 0, state)
        assert busy is not None
        index.unlease(busy)
    ready(index, "d")
    ready(index, "e")
    assert names(index) == set("abce")
    for entry in list(index.entries.values()):
        entry.leases += 1
    assert index.insert(SPACE, piece("f"), 0, State.WRITING) is None
    assert names(index) == set("abce")


def test_too_large_evicts_nothing(index: Index) -> None:
    for name in "abcd":
        ready(index, name)
    big = Piece(b"big".ljust(32), b"".ljust(32), 0, 16 * 5)
    assert index.insert(SPACE, big, 0, State.WRITING) is None
    assert names(index) == set("abcd")


def test_a_slot_is_free_only_after_the_last_lease(index: Index) -> None:
    entry = ready(index, "a")
    entry.leases += 2
    index.drop(entry)
    assert index.allocator.num_slots == 1
    assert index.get(entry.chunk_hash, 0) is None
    index.unlease(entry)
    assert index.allocator.num_slots == 1
    index.unlease(entry)
    assert index.allocator.num_slots == 0


def test_a_dropped_key_may_be_inserted_anew_beside_its_leased_slot(index: Index) -> None:
    old = ready(index, "a")
    old.leases += 1
    index.drop(old)
    new = ready(index, "a")
    assert new.offset != old.offset
    index.unlease(old)
    assert index.get(new.chunk_hash, 0) is new
    assert index.allocator.num_slots == 1


def test_dropping_a_parent_leaves_its_children(index: Index) -> None:
    parent = ready(index, "1")
    ready(index, "2", "1")
    index.drop(parent)
    assert names(index) == {"2"}
    for name in "abcd":
        ready(index, name)
    assert names(index) == set("abcd")
    assert index.allocator.num_slots == 4


def test_shards_are_apart(index: Index) -> None:
    first = index.insert(SPACE, piece("a"), 0, State.READY)
    second = index.insert(SPACE, piece("a"), 1, State.READY)
    assert first is not None
    assert second is not None
    assert (first.shard, second.shard) == (0, 1)
    assert index.get(first.chunk_hash, 1) is second


def test_a_parent_that_comes_after_its_children_is_kept_for_them() -> None:
    index = Index(SlotAllocator(4 * SLOT), LRUPolicy())
    late = ready(index, "1")
    ready(index, "2", "1")
    index.drop(late)  # a tier has lost it, or it was damaged; the request computes it and stores it again
    late = ready(index, "1")
    assert late.num_children == 1
    ready(index, "3", "0")
    assert ready(index, "0").num_children == 1
    index.touch([index.entries[entry_key(piece(name).chunk_hash, 0)] for name in "23"])
    ready(index, "4")
    assert {"0", "1"} < names(index)
    for entry in list(index.entries.values()):
        index.drop(entry)
    assert index._awaited == {}


def test_a_parent_for_which_there_is_no_room_leaves_nothing(index: Index) -> None:
    held = [ready(index, name) for name in "abcd"]
    for entry in held:
        entry.leases += 1
    assert index.insert(SPACE, piece("2", "1"), 0, State.WRITING) is None
    assert index._awaited == {}
