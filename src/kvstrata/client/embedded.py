"""Embedded mode: a private server as a child process of whichever connector of an engine comes first.

All connectors of one engine (its scheduler and its workers are different processes) agree on a directory by the
engine's id. Who gets the lock in it starts the server and restarts it if it dies; the others only connect.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from kvstrata.config import Settings

logger = logging.getLogger(__name__)

_PREFIX = "embedded-"
_SWEEP_AGE_SECONDS = 60.0
FAILURE_FILE = "failure"
"""Where a server that cannot start says why, for all processes of its engine."""


class EmbeddedServer:
    """The private server of one engine, as one of its processes sees it."""

    def __init__(self, settings: Settings, runtime_directory: Path, engine_id: str) -> None:
        """Start the server, or leave that to the process that already did."""
        self._settings = settings
        self._directory = runtime_directory / (_PREFIX + hashlib.sha256(engine_id.encode()).hexdigest()[:16])
        self._lock = _open_lock(self._directory)
        self._process: subprocess.Popen[bytes] | None = None
        self.keep_alive()
        _sweep(runtime_directory)

    @property
    def failure(self) -> str | None:
        """Why the server will not come: what it said when it could not start; None while it may."""
        try:
            return (self._directory / FAILURE_FILE).read_text()
        except OSError:
            pass
        status = None if self._process is None else self._process.poll()
        return None if status is None else f"it ended with status {status}; its last lines are above"

    @property
    def endpoint(self) -> str:
        return f"ipc://{self._directory}/control.sock"

    def keep_alive(self) -> None:
        """Start the server if nobody has, or restart it if it was ours and died. Does not wait for it."""
        if self._process is not None:
            status = self._process.poll()
            if status is None or status == os.EX_CONFIG:  # it runs, or it has said why it cannot
                return
            logger.warning("the embedded server ended with status %d; it is started again", status)
        elif not _try_lock(self._lock):
            return
        with contextlib.suppress(FileNotFoundError):
            (self._directory / FAILURE_FILE).unlink()
        self._process = subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-m", "kvstrata.server.embedded", str(self._directory), str(os.getpid())],
            stdin=subprocess.PIPE,
            # Not the engine's stdout, which may be a protocol of its own.
            stdout=subprocess.DEVNULL,
        )
        assert self._process.stdin is not None  # noqa: S101  PIPE was asked for
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(msgspec.json.encode(self._settings))

    def close(self) -> None:
        """End the server if it is ours; the directory goes with it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            shutil.rmtree(self._directory, ignore_errors=True)
            self._process = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _open_lock(directory: Path) -> int:
    """The lock file of an engine, young, so that nobody sweeps it away before it is locked."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.utime(fd)
    return fd


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(runtime_directory: Path) -> None:
    """Remove the directories of engines that were killed: those whose lock nobody holds, unless just made."""
    for lock_path in runtime_directory.glob(f"{_PREFIX}*/lock"):
        with contextlib.suppress(OSError):
            fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if time.time() - os.fstat(fd).st_mtime > _SWEEP_AGE_SECONDS and _try_lock(fd):
                    shutil.rmtree(lock_path.parent, ignore_errors=True)
            finally:
                os.close(fd)
