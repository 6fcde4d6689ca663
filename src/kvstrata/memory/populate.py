"""Faulting a shared mapping in, step by step, behind the back of its users."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading

_log = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not know it
_STEP_BYTES = 16 << 20  # as fast as larger steps, and about 10 ms, during which others cannot map memory
_LOWEST_PRIORITY = 19

# Not mmap.madvise: that keeps the GIL, and a step takes milliseconds.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Population:
    """A thread of the lowest priority that populates ``[address, address + size_bytes)`` once.

    The mapping and the descriptor must stay until ``stop`` returned, which takes at most one step.
    """

    def __init__(self, address: int, fd: int, size_bytes: int, step_bytes: int = _STEP_BYTES) -> None:
        self.done_bytes = 0
        self._address = address
        self._fd = fd
        self._size_bytes = size_bytes
        self._step_bytes = step_bytes
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstrata-populate", daemon=True)
        self._thread.start()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait for the end; whether all is populated."""
        self._thread.join(timeout_seconds)
        return self.done_bytes == self._size_bytes

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        while self.done_bytes < self._size_bytes and not self._stopping.is_set():
            step = min(self._step_bytes, self._size_bytes - self.done_bytes)
            try:
                self._populate(self.done_bytes, step)
            except OSError as error:
                _log.error("L1 pool: only %d bytes could be populated: %s", self.done_bytes, error)
                return
            self.done_bytes += step

    def _populate(self, offset: int, size: int) -> None:
        if _libc.madvise(self._address + offset, size, _MADV_POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise OSError(code, os.strerror(code))
        # An older kernel: allocate the pages without mapping them. Unlike touching them that is safe beside
        # other writers.
        os.posix_fallocate(self._fd, offset, size)
