"""The memory of the L1 pool: one mapping, shared by the server and the workers of its host."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Self

from kvstrata.errors import PoolError
from kvstrata.memory.headroom import available_memory_bytes
from kvstrata.memory.populate import Population

_SETTING = "max_local_cpu_size (--l1-size-gb)"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_HUGE_PAGE_BYTES = 2 << 20


class SharedRegion:
    """A writable shared mapping, and the file descriptor by which others map the same memory.

    The memory has no name anywhere: it is gone with the last process that maps it, however that one ends.

    Threading: ``close`` from one thread; everything else from any.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Map ``size_bytes`` of ``fd`` and own the descriptor. Use ``create`` or ``attach``."""
        try:
            self._mmap: mmap.mmap | None = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)
        except (OSError, ValueError, OverflowError) as error:
            os.close(fd)
            raise PoolError(f"cannot map an L1 pool of {_gigabytes(size_bytes)}: {error}") from error
        # Prompts do not belong into core dumps, nor do dumps of this size onto a disk.
        self._mmap.madvise(mmap.MADV_DONTDUMP)
        self._fd = fd
        self.size_bytes = size_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))
        """Where the mapping begins in this process."""
        self._view: memoryview | None = memoryview(self._mmap)
        self._population: Population | None = None

    @classmethod
    def create(cls, size_bytes: int, directory: str | os.PathLike[str] | None = None) -> Self:
        """New memory, zeros: a sealed memfd, or an unnamed file in ``directory``.

        ``directory`` is for a mount that the operator chose (huge pages, a bounded tmpfs). Its free space is
        checked here, because running out of it later would be a SIGBUS. With huge pages ``size_bytes`` is
        rounded up to whole ones.

        Raises:
            PoolError: there is not that much memory or space, or the directory cannot hold such a file.
        """
        if size_bytes <= 0:
            raise PoolError(f"an L1 pool of {size_bytes} bytes; set {_SETTING} to more than 0")
        if directory is None:
            _check_memory(size_bytes)
            fd = os.memfd_create("kvstrata-l1", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            _set_size(fd, size_bytes)
            # Nobody who has the descriptor can make another one's access fault.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        else:
            fd, size_bytes = _unnamed_file(Path(directory), size_bytes)
        return cls(fd, size_bytes)

    @classmethod
    def attach(cls, fd: int, size_bytes: int) -> Self:
        """Map the memory behind ``fd``, received from its owner; the descriptor is ours from here on.

        Raises:
            PoolError: the file is smaller than ``size_bytes``, or cannot be mapped.
        """
        actual = os.fstat(fd).st_size
        if actual < size_bytes:
            os.close(fd)
            raise PoolError(f"the L1 pool is {actual} bytes where {size_bytes} were announced")
        return cls(fd, size_bytes)

    @property
    def fd(self) -> int:
        """The descriptor to hand over; stays owned by this region.

        Raises:
            PoolError: the region is closed.
        """
        if self._fd < 0:
            raise PoolError("the L1 pool is closed")
        return self._fd

    @property
    def view(self) -> memoryview:
        """All of it, writable, format ``B``.

        Raises:
            PoolError: the region is closed.
        """
        if self._view is None:
            raise PoolError("the L1 pool is closed")
        return self._view

    def populate(self) -> None:
        """Begin to fault all pages in, in the background, so that copies do not wait for the kernel.

        For the creator that allocates the memory, for others it only fills their page tables. Content is
        left alone, whoever writes meanwhile. Does nothing when already begun.
        """
        if self._population is None and self._view is not None:
            self._population = Population(self.address, self._fd, self.size_bytes)

    @property
    def populated_bytes(self) -> int:
        """How far the population has come."""
        return self._population.done_bytes if self._population else 0

    def wait_populated(self, timeout_seconds: float | None = None) -> bool:
        """Wait for the population to end; whether all of it is populated."""
        return self._population is not None and self._population.wait(timeout_seconds)

    def close(self) -> None:
        """Let the memory go. Idempotent.

        Views that others still hold stay valid: the mapping is gone with the last of them.
        """
        if self._population is not None:
            self._population.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        view, mapping = self._view, self._mmap
        self._view = self._mmap = None
        # A BufferError says that slices are in use. They hold the mmap object, which unmaps when it is freed.
        with contextlib.suppress(BufferError):
            if view is not None:
                view.release()
            if mapping is not None:
                mapping.close()


def _unnamed_file(directory: Path, size_bytes: int) -> tuple[int, int]:
    """A file without a name in ``directory``, and its size."""
    try:
        space = os.statvfs(directory)
    except OSError as error:
        raise PoolError(f"cannot create the L1 pool in {directory}: {error.strerror}") from error
    if space.f_bsize >= _HUGE_PAGE_BYTES:
        size_bytes = -(-size_bytes // space.f_bsize) * space.f_bsize
    else:  # huge pages are set aside and no part of the available memory; other pages are
        _check_memory(size_bytes)
    free_bytes = space.f_bavail * space.f_frsize
    if size_bytes > free_bytes:
        raise PoolError(
            f"an L1 pool of {_gigabytes(size_bytes)} does not fit in {directory}, which has "
            f"{_gigabytes(free_bytes)} free; lower {_SETTING} or enlarge it"
        )
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        unknown = error.errno in {errno.EOPNOTSUPP, errno.EISDIR}
        reason = "its file system has no unnamed files" if unknown else error.strerror
        raise PoolError(f"cannot create the L1 pool in {directory}: {reason}") from error
    _set_size(fd, size_bytes)
    return fd, size_bytes


def _set_size(fd: int, size_bytes: int) -> None:
    try:
        os.ftruncate(fd, size_bytes)
    except (OSError, OverflowError) as error:
        os.close(fd)
        raise PoolError(f"cannot create an L1 pool of {_gigabytes(size_bytes)}: {error}") from error


def _check_memory(size_bytes: int) -> None:
    available_bytes = available_memory_bytes()
    if available_bytes is not None and size_bytes > available_bytes:
        raise PoolError(
            f"an L1 pool of {_gigabytes(size_bytes)} does not fit in memory, of which "
            f"{_gigabytes(available_bytes)} are available; lower {_SETTING}"
        )


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.2f} GiB"
