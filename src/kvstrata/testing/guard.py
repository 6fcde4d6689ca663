"""Runs one command and sees to it that nothing the command started outlives the owner.

    python guard.py GRACE_SECONDS COMMAND [ARGUMENT ...]

The owner holds the other end of standard input. When it closes that end, or dies in whatever way, the command
gets SIGTERM, after ``GRACE_SECONDS`` every process below it SIGKILL, and then the guard ends. As a child
subreaper it is the parent of every descendant whose own parent died, so that none is missed, whatever session
or process group it moved to. The shared memory that those processes alone had mapped under the names of
Python's ``multiprocessing`` (vLLM's message queues and those of its ranks) is unlinked.

On standard output it says ``started PID``, and ``ended STATUS`` when the command has ended; the rest of the
tree then stays until the owner closes standard input, so that a test can look at it.

This is a program, run by its path, which imports nothing but the standard library: it starts in 30 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_SHARED_MEMORY = re.compile(r"/dev/shm/(?:psm_|sem\.mp-|vllm_dist_)\S+")  # noqa: S108  (where it is, not where we put it)
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """The processes below ``root``, itself not included, parents before children."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  (a Path object per process would be slow)
        if entry.isdigit():
            # A process that ended between the listing and here is gone, which is what we want of it.
            with contextlib.suppress(OSError):
                stat = Path("/proc", entry, "stat").read_text(errors="replace")
                parent = int(stat.rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(0), [])
        found += below
        waiting += below
    return found


def shared_memory_of(processes: list[int]) -> set[str]:
    """The files of Python's ``multiprocessing`` in /dev/shm that any of ``processes`` has mapped or open."""
    names: set[str] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            names.update(_SHARED_MEMORY.findall(Path(f"/proc/{process}/maps").read_text(errors="replace")))
    return names


class Guard:
    """The command, its descendants, and the two pipes to the owner."""

    def __init__(self, grace_seconds: float, command: list[str]) -> None:
        self._grace_seconds = grace_seconds
        self._shared_memory: set[str] = set()
        self._wakeup, self._wakeup_end = os.pipe()
        os.set_blocking(self._wakeup_end, False)
        signal.set_wakeup_fd(self._wakeup_end)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        # The owner closes standard input when it wants an end; a Ctrl-C is the owner's to handle.
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._main = self._start(command)
        self._tell(f"started {self._main}")
        self._ended = False

    @staticmethod
    def _start(command: list[str]) -> int:
        def in_child() -> None:
            die_with_parent()
            for restored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(restored, signal.SIG_DFL)

        # The guard has one thread, so that code between fork and exec is safe.
        return subprocess.Popen(  # noqa: S603  (the owner's own command)
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=in_child,  # noqa: PLW1509
        ).pid

    @staticmethod
    def _tell(line: str) -> None:
        # The owner may be gone already; its end of standard input says so too.
        with contextlib.suppress(OSError):
            os.write(1, f"{line}\n".encode())

    def run(self) -> None:
        """Wait until the owner closes standard input; then end the whole tree."""
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(timeout=10.0):
                    if key.fd == 0 and not os.read(0, 4096):
                        self._end_all()
                        return
                    if key.fd == self._wakeup:
                        os.read(self._wakeup, 4096)
                self._reap()
                self._note_shared_memory()

    def _reap(self) -> None:
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            if process == self._main:
                self._ended = True
                self._tell(f"ended {os.waitstatus_to_exitcode(status)}")

    def _note_shared_memory(self) -> None:
        self._shared_memory |= shared_memory_of(descendants(os.getpid()))

    def _end_all(self) -> None:
        self._note_shared_memory()
        deadline = time.monotonic() + self._grace_seconds
        self._reap()
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._main, signal.SIGTERM)
        while descendants(os.getpid()) and time.monotonic() < deadline:
            time.sleep(0.02)
            self._reap()
        # Those that are killed may have started others a moment before: again until none is left.
        while below := descendants(os.getpid()):
            for process in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.01)
            self._reap()
        for name in self._shared_memory:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()


if __name__ == "__main__":
    Guard(float(sys.argv[1]), sys.argv[2:]).run()
