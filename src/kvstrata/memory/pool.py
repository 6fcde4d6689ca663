"""Which bytes of the L1 pool belong to whom."""

from __future__ import annotations

import bisect

SLOT_ALIGNMENT_BYTES = 4096
"""Offsets and sizes of slots are multiples of this, so that direct I/O and page copies are possible."""


class SlotAllocator:
    """Extents of ``[0, capacity_bytes)``, handed out by best fit.

    Pure state: no memory, no I/O and no lock; the caller holds one around all calls. Between any two calls
    allocated and free extents cover the range without overlap, and no two free extents touch.

    Costs: a dict entry per slot and a few per hole. ``_hole_sizes`` is a sorted list, but of distinct sizes:
    n of them need at least n * (n + 1) / 2 pages of free space, so there are at most 3,200 in a pool of
    20 GB, and inserting one moves 26 kB at worst. Everything else is a dict look-up or a bisection.
    """

    def __init__(self, capacity_bytes: int) -> None:
        """A wholly free range; what exceeds a multiple of the alignment is not used."""
        self._capacity = capacity_bytes - capacity_bytes % SLOT_ALIGNMENT_BYTES
        self._budget = self._capacity
        self._used = 0
        self._slots: dict[int, int] = {}  # offset -> size
        self._sizes: dict[int, int] = {}  # one int object per size of slot, instead of one per slot
        self._hole_size: dict[int, int] = {}  # offset of a hole -> its size
        self._hole_start: dict[int, int] = {}  # end of a hole -> its offset
        self._holes: dict[int, dict[int, None]] = {}  # size -> offsets of the holes of that size
        self._hole_sizes: list[int] = []  # the keys of _holes, sorted
        if self._capacity > 0:
            self._add_hole(0, self._capacity)

    @property
    def capacity_bytes(self) -> int:
        return self._capacity

    @property
    def budget_bytes(self) -> int:
        """What slots may take together; no more than the capacity. When lowered below what is used, nothing is
        handed out until enough was freed."""
        return self._budget

    @budget_bytes.setter
    def budget_bytes(self, value: int) -> None:
        self._budget = max(0, min(value, self._capacity))

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots, rounding included."""
        return self._used

    @property
    def free_bytes(self) -> int:
        return self._capacity - self._used

    @property
    def largest_free_bytes(self) -> int:
        """The largest size that ``allocate`` can serve now."""
        return self._hole_sizes[-1] if self._hole_sizes else 0

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes that lie outside the largest hole; 0 when nothing is free."""
        return 1 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def slot_bytes(self, offset: int) -> int:
        """What the slot at ``offset`` takes, rounding included."""
        return self._slots[offset]

    def allocate(self, size_bytes: int) -> int | None:
        """Take a slot of at least ``size_bytes``; return its offset, or None when no hole is large enough.

        Raises:
            ValueError: ``size_bytes`` is not positive.
        """
        if size_bytes <= 0:
            raise ValueError(f"a slot of {size_bytes} bytes")
        size = slot_bytes(size_bytes)
        size = self._sizes.setdefault(size, size)
        index = bisect.bisect_left(self._hole_sizes, size)
        if index == len(self._hole_sizes) or self._used + size > self._budget:
            return None
        found = self._hole_sizes[index]
        offset = self._take_hole(found)
        if found > size:
            self._add_hole(offset + size, found - size)
        self._slots[offset] = size
        self._used += size
        return offset

    def free(self, offset: int) -> None:
        """Give the slot at ``offset`` back; it is joined with the holes beside it.

        Raises:
            ValueError: no slot begins at ``offset``.
        """
        size = self._slots.pop(offset, None)
        if size is None:
            raise ValueError(f"no slot begins at offset {offset}")
        self._used -= size
        start, end = offset, offset + size
        before = self._hole_start.get(start)
        if before is not None:
            self._remove_hole(before, start - before)
            start = before
        after = self._hole_size.get(end)
        if after is not None:
            self._remove_hole(end, after)
            end += after
        self._add_hole(start, end - start)

    def _add_hole(self, offset: int, size: int) -> None:
        self._hole_size[offset] = size
        self._hole_start[offset + size] = offset
        holes = self._holes.get(size)
        if holes is None:
            holes = self._holes[size] = {}
            bisect.insort(self._hole_sizes, size)
        holes[offset] = None

    def _take_hole(self, size: int) -> int:
        """Remove the youngest hole of exactly ``size``; return its offset."""
        holes = self._holes[size]
        offset, _ = holes.popitem()
        self._forget_hole(offset, size, holes)
        return offset

    def _remove_hole(self, offset: int, size: int) -> None:
        holes = self._holes[size]
        del holes[offset]
        self._forget_hole(offset, size, holes)

    def _forget_hole(self, offset: int, size: int, holes: dict[int, None]) -> None:
        del self._hole_size[offset]
        del self._hole_start[offset + size]
        if not holes:
            del self._holes[size]
            del self._hole_sizes[bisect.bisect_left(self._hole_sizes, size)]


def slot_bytes(size_bytes: int) -> int:
    """``size_bytes`` rounded up to whole alignment units: what a slot of that size takes of the pool."""
    return -(-size_bytes // SLOT_ALIGNMENT_BYTES) * SLOT_ALIGNMENT_BYTES
