"""Memory of a tier's own, registered with a client library, through which its transfers go.

Libraries that have a transfer's memory registered may touch it after they gave the transfer up. In memory of the
caller, which is another entry's by then, that would be a wrong byte; here it is a broken checksum at worst.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kvstrata.errors import TierUnavailable
from kvstrata.memory.pool import SlotAllocator


class TransferStuckError(TierUnavailable):
    """A transfer did not end in time and goes on; its memory must not be used again."""


class Arena:
    """``size_bytes`` of memory (taken as it is touched), lent in pieces. Thread-safe.

    ``setting`` is the option that sets the size, for messages.
    """

    def __init__(self, size_bytes: int, setting: str) -> None:
        self.size_bytes = size_bytes
        self._setting = setting
        self._memory = mmap.mmap(-1, size_bytes)
        self._view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._pieces = SlotAllocator(size_bytes)
        self._changed = threading.Condition()

    @contextmanager
    def lend(self, sizes: Sequence[int], timeout_seconds: float) -> Iterator[list[tuple[int, memoryview]]]:
        """Pieces of at least these sizes, as address and memory; waits while others have too much.

        They are taken back at the end of the ``with`` block, unless it ends with :class:`TransferStuckError`.

        Raises:
            TierUnavailable: there is not that much, or it did not become free in time.
        """
        deadline = time.monotonic() + timeout_seconds
        offsets: list[int] = []
        try:
            with self._changed:
                while not self._take(sizes, offsets):
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        raise TierUnavailable(
                            f"no room for {sum(sizes)} bytes in a buffer of {self.size_bytes};"
                            f" raise {self._setting}"
                        )
            yield [
                (self.address + offset, self._view[offset : offset + size])
                for offset, size in zip(offsets, sizes, strict=True)
            ]
        except TransferStuckError:
            offsets.clear()
            raise
        finally:
            with self._changed:
                for offset in offsets:
                    self._pieces.free(offset)
                self._changed.notify_all()

    def _take(self, sizes: Sequence[int], offsets: list[int]) -> bool:
        """All pieces or none of them."""
        for size in sizes:
            offset = self._pieces.allocate(size)
            if offset is None:
                while offsets:
                    self._pieces.free(offsets.pop())
                return False
            offsets.append(offset)
        return True
