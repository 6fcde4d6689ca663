"""What the participants of one directory tell each other: a lease for who cleans, and what the last cleaning found.

Both are files in ``.kvstrata`` of the directory. No lock is used that NFS lacks: a lease is a file that only one
participant can create (``O_EXCL``), and everything else appears by a rename.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from pathlib import Path

import msgspec

from kvstrata.tiers.file.clock import ServerClock

STATE = ".kvstrata"
"""The directory of these files; where it is missing, so is the directory's file system."""
LEASE_SECONDS = 30.0
"""A lease that has not changed for this long, by the watch of the one who looks, is nobody's any more."""
RENEW_SECONDS = 5.0


class Cleaned(msgspec.Struct, frozen=True):
    """What a cleaning left."""

    used_bytes: int
    entries: int
    host: str
    seconds: float
    """How long it took."""


class Record:
    """The file ``cleaned``, replaced by each cleaning."""

    def __init__(self, root: str) -> None:
        self._path = f"{root}/{STATE}/cleaned"
        self._seen: tuple[int, int] | None = None

    def news(self) -> Cleaned | None:
        """What a cleaning found that was not seen yet. The file is opened, so that NFS asks the server."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            text = os.read(fd, 4096)
        finally:
            os.close(fd)
        if (status.st_mtime_ns, status.st_ino) == self._seen:
            return None
        self._seen = (status.st_mtime_ns, status.st_ino)
        try:
            return msgspec.json.decode(text, type=Cleaned)
        except msgspec.DecodeError:
            return None

    def publish(self, cleaned: Cleaned) -> None:
        """Tell the others; :meth:`news` does not tell us."""
        staged = f"{self._path}.{secrets.token_hex(8)}"
        try:
            Path(staged).write_bytes(msgspec.json.encode(cleaned))
            Path(staged).replace(self._path)
        except OSError:
            Path(staged).unlink(missing_ok=True)
            raise
        status = os.stat(self._path)  # noqa: PTH116 - a string
        self._seen = (status.st_mtime_ns, status.st_ino)


class Lease:
    """The right to clean. Should two have it after all (a holder that slept too long), both only evict too much.

    Not thread-safe.
    """

    def __init__(self, root: str, clock: ServerClock) -> None:
        self._path = f"{root}/{STATE}/cleaner"
        self._clock = clock
        self._fd = -1
        self._renewed_at = 0.0
        self._watched: tuple[int, int] | None = None
        self._watched_since = 0.0

    def take(self) -> bool:
        """Whether it is ours now. A lease that its holder left behind is removed first, and taken the next time."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags, 0o600)
        except FileExistsError:
            self._remove_stale()
            return False
        with contextlib.suppress(OSError):  # on a full device a lease says nothing of its holder
            os.write(fd, f"{socket.gethostname()} {os.getpid()}\n".encode())
        try:
            self._clock.learn(fd)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        self._renewed_at = time.monotonic()
        return True

    def _remove_stale(self) -> None:
        """Remove the lease when it has not changed for long by our own watch: no clocks are compared."""
        found = _identity(self._path)
        now = time.monotonic()
        if found is None or found != self._watched:
            self._watched, self._watched_since = found, now
            return
        if now - self._watched_since < LEASE_SECONDS:
            return
        # Two may get here. A rename lets one of them have the file, and what was renamed tells whether it was the
        # stale one, or a new one that came between.
        aside = f"{self._path}.{secrets.token_hex(8)}"
        try:
            Path(self._path).rename(aside)
        except FileNotFoundError:
            return
        if _identity(aside) != found:
            with contextlib.suppress(OSError):  # its holder finds out when it renews
                Path(self._path).hardlink_to(aside)
        Path(aside).unlink(missing_ok=True)

    def renew(self) -> bool:
        """Keep it, in time; False when it is no longer ours."""
        if time.monotonic() - self._renewed_at < RENEW_SECONDS:
            return True
        try:
            self._clock.learn(self._fd)
            is_ours = os.fstat(self._fd).st_ino == os.stat(self._path).st_ino  # noqa: PTH116 - a string
        except OSError:
            is_ours = False
        self._renewed_at = time.monotonic()
        if not is_ours:
            self._close()
        return is_ours

    def release(self) -> None:
        """Give it back."""
        if self._fd < 0:
            return
        self._renewed_at = 0.0
        if self.renew():
            Path(self._path).unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


def _identity(path: str) -> tuple[int, int] | None:
    """What tells this state of a file from others. The file is opened, so that NFS asks the server."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return status.st_mtime_ns, status.st_ino
