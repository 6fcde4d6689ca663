import gc
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvstrata.memory.pool import SLOT_ALIGNMENT_BYTES, SlotAllocator, slot_bytes

PAGE = SLOT_ALIGNMENT_BYTES
CAPACITY_PAGES = 64


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator beside the simplest model there is: a list of pages that are free or not."""

    slots = Bundle("slots")

    def __init__(self):
        super().__init__()
        self.allocator = SlotAllocator(CAPACITY_PAGES * PAGE + 100)
        self.free = [True] * CAPACITY_PAGES

    def holes(self) -> list[tuple[int, int]]:
        """``(size, start)`` in pages of each run of free pages."""
        runs, start = [], None
        for page, free in enumerate([*self.free, False]):
            if free and start is None:
                start = page
            elif not free and start is not None:
                runs.append((page - start, start))
                start = None
        return runs

    @rule(target=slots, size=st.integers(1, 20 * PAGE))
    def allocate(self, size):
        pages = -(-size // PAGE)
        fitting = [hole for hole in self.holes() if hole[0] >= pages]
        offset = self.allocator.allocate(size)
        if not fitting:
            assert offset is None
            return (None, 0)
        assert offset is not None
        assert offset % PAGE == 0
        start = offset // PAGE
        assert all(self.free[start : start + pages])
        assert (min(fitting)[0], start) in fitting, "not from the front of a best fitting hole"
        self.free[start : start + pages] = [False] * pages
        return (offset, pages)

    @rule(slot=consumes(slots))
    def give_back(self, slot):
        offset, pages = slot
        if offset is None:
            return
        self.allocator.free(offset)
        start = offset // PAGE
        self.free[start : start + pages] = [True] * pages
        with pytest.raises(ValueError, match="no slot"):
            self.allocator.free(offset)

    @invariant()
    def counts_agree(self):
        free_bytes = sum(self.free) * PAGE
        assert self.allocator.free_bytes == free_bytes
        assert self.allocator.used_bytes == self.allocator.capacity_bytes - free_bytes
        assert self.allocator.largest_free_bytes == max(self.holes(), default=(0, 0))[0] * PAGE


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@given(st.lists(st.integers(1, 10 * PAGE), max_size=60), st.randoms(use_true_random=False))
def test_all_is_one_hole_again_when_all_is_freed(sizes, source):
    allocator = SlotAllocator(100 * PAGE)
    offsets = [offset for size in sizes if (offset := allocator.allocate(size)) is not None]
    source.shuffle(offsets)
    for offset in offsets:
        allocator.free(offset)
    assert allocator.used_bytes == 0
    assert allocator.num_slots == 0
    assert allocator.largest_free_bytes == 100 * PAGE
    assert allocator.allocate(100 * PAGE) == 0


def test_a_full_range_has_no_room_and_no_holes():
    allocator = SlotAllocator(4 * PAGE)
    assert [allocator.allocate(1) for _ in range(5)] == [0, PAGE, 2 * PAGE, 3 * PAGE, None]
    assert allocator.largest_free_bytes == allocator.free_bytes == 0


@pytest.mark.parametrize("capacity", [0, 1, PAGE - 1])
def test_less_than_a_page_holds_nothing(capacity):
    allocator = SlotAllocator(capacity)
    assert allocator.capacity_bytes == allocator.largest_free_bytes == 0
    assert allocator.allocate(1) is None


@pytest.mark.parametrize("size", [0, -1])
def test_a_slot_has_a_size(size):
    with pytest.raises(ValueError, match="slot of"):
        SlotAllocator(PAGE).allocate(size)


def test_sizes_are_whole_pages():
    assert [slot_bytes(size) for size in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]


def test_memory_per_slot():
    """With the index, a chunk may cost 600 bytes; the allocator's part is bounded here."""
    count = 100_000
    gc.collect()
    tracemalloc.start()
    try:
        allocator = SlotAllocator(count * 2 * 5_898_240)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            allocator.allocate(5_898_240 if number % 8 else 1_105_920)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert allocator.num_slots == count
    assert used / count < 110


def test_many_sizes_over_a_long_time():
    """No drift between the counters and the extents, at a size where every structure is in use."""
    source = random.Random(5)
    allocator = SlotAllocator(20_000 * PAGE)
    held: dict[int, int] = {}
    for _ in range(30_000):
        size = source.randrange(1, 200 * PAGE)
        offset = allocator.allocate(size)
        if offset is None:
            for gone in source.sample(sorted(held), len(held) // 4):
                allocator.free(gone)
                del held[gone]
        else:
            held[offset] = slot_bytes(size)
    end = 0
    for offset, size in sorted(held.items()):
        assert offset >= end
        end = offset + size
    assert allocator.used_bytes == sum(held.values())
    assert end <= allocator.capacity_bytes
