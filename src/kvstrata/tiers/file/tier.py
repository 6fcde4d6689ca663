"""The shared-directory tier: one file per frame in a directory that many hosts mount, NFS for example.

``<path>/<engine@model@world size, quoted>/<worker>/<first two digits>/<chunk hash>.kv``, as the disk tier has it.

The file system is the only truth: nothing is kept in memory, and no lock is used. A frame is written under a name
that no other participant uses, and appears by a rename; it disappears by an unlink. Whoever reads meanwhile gets a
whole frame or a miss. :mod:`~kvstrata.tiers.file.cleaner` keeps the budget.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from kvstrata.errors import ConfigError, TierUnavailable
from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.tiers.file.cleaner import Cleaner
from kvstrata.tiers.file.clock import ServerClock
from kvstrata.tiers.file.state import STATE
from kvstrata.tiers.files import NO_WRITES, allocate, key_files, read_into, translated, write_all
from kvstrata.tiers.paths import key_path, path_to_write
from kvstrata.types import Miss, MissReason, TierStats

TOUCH_SECONDS = 60.0
"""The time of use is written to a file at most this often."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""What a file says that another host has removed or replaced."""


class FileOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the shared-directory tier. ``timeout_seconds`` cannot be kept here: how long a file server is
    waited for is decided when it is mounted."""

    path: str
    """The directory, which must exist. Files in it that are not ours are never touched."""
    max_bytes: int
    """Byte budget of all frames in the directory; the same on every host."""
    ttl_seconds: float | None = None
    """Frames expire this long after they were written; the same on every host."""
    fsync: bool = False
    """Wait for the device on each write. Without it a power failure turns recent frames into misses."""


class FileTier(Tier):
    """Frames in files that many processes on many hosts share, least recently used evicted first."""

    kind: ClassVar[str] = "file"
    Options: ClassVar[type[TierOptions]] = FileOptions

    def __init__(self, options: FileOptions) -> None:
        """Open the directory, without a look at the frames in it.

        Raises:
            ConfigError: the path or an option cannot be used.
        """
        if options.max_bytes <= 0:
            raise ConfigError(f"max_bytes of the file tier is {options.max_bytes}; it must be positive")
        if options.ttl_seconds is not None and options.ttl_seconds <= 0:
            raise ConfigError(f"ttl_seconds of the file tier is {options.ttl_seconds}; it must be positive")
        self.options = options
        self._root = str(Path(options.path).expanduser().absolute())
        self._clock = ServerClock()
        host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:40]
        self._writer = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        try:
            self._join()
            self._cleaner = Cleaner(self._root, options.max_bytes, options.ttl_seconds, self._clock)
        except OSError as error:
            raise ConfigError(f"path of the file tier, {options.path!r}, cannot be used: {error}") from error

    def _join(self) -> None:
        """Become a participant, and learn the server's time. A directory that may only be read is all right."""
        if not Path(self._root).is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no such directory; is it mounted?")
        self._device = Path(self._root).stat().st_dev
        self._may_write = False
        try:
            Path(f"{self._root}/{STATE}").mkdir(exist_ok=True)
            probe = f"{self._root}/{STATE}/{self._writer}"
            fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return
        self._may_write = True
        try:
            self._clock.learn(fd)
        finally:
            os.close(fd)
            Path(probe).unlink(missing_ok=True)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. A system call for each key, which the kernel answers from what it has cached of the
        directory, or the file server does."""
        with translated("look-up", self._root):
            held = [self._holds(key) for key in keys]
            if not any(held):
                self._check_presence()
            return held

    def _holds(self, key: str) -> bool:
        path = key_path(key)
        if path is None:
            return False
        if self.options.ttl_seconds is None:
            return os.access(f"{self._root}/{path}", os.F_OK)
        try:
            return not self._has_expired(os.stat(f"{self._root}/{path}"))  # noqa: PTH116 - a string
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return False

    def _has_expired(self, status: os.stat_result) -> bool:
        ttl = self.options.ttl_seconds
        return ttl is not None and self._clock.now() - status.st_mtime > ttl

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`."""
        with translated("read", self._root):
            results = [self._read(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]
            if all(isinstance(result, Miss) for result in results):
                self._check_presence()
            return results

    def _read(self, key: str, buffer: memoryview) -> int | Miss:
        path = key_path(key)
        if path is None:
            return Miss(MissReason.ABSENT)
        try:
            fd = os.open(f"{self._root}/{path}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._read_open(fd, buffer)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return Miss(MissReason.ABSENT)

    def _read_open(self, fd: int, buffer: memoryview) -> int | Miss:
        status = os.fstat(fd)
        if self._has_expired(status):
            return Miss(MissReason.EXPIRED)
        count = read_into(fd, buffer, status.st_size)
        if count > len(buffer):
            return Miss(MissReason.CORRUPT, f"file larger than {len(buffer)} bytes")
        now = self._clock.now()
        if now - max(status.st_atime, status.st_mtime) > TOUCH_SECONDS:
            # Not for a file of another user, or in a directory that may only be read: it goes a little earlier.
            with contextlib.suppress(OSError):
                os.utime(fd, ns=(int(now * 1e9), status.st_mtime_ns))
        return count

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`. Takes part in cleaning while it is due.

        Raises:
            TierFull: the device or a quota is full, nothing may be written, cleaning has not kept up, a frame
                exceeds the budget, or a key is too long for a path.
            ValueError: not a key.
        """
        with translated("write", self._root, NO_WRITES):
            for key, frame in zip(keys, frames, strict=True):
                path = path_to_write(key)
                self._check_presence()
                self._cleaner.admit(len(frame))
                self._write(f"{self._root}/{path}", frame)

    def _write(self, target: str, frame: memoryview) -> None:
        directory = target.rpartition("/")[0]
        staged = f"{directory}/.{self._writer}-{next(self._numbers)}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(staged, flags, 0o600)
        except FileNotFoundError:
            Path(directory).mkdir(parents=True, exist_ok=True)
            fd = os.open(staged, flags, 0o600)
        try:
            try:
                allocate(fd, len(frame))
                write_all(fd, frame)
                if self.options.fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)  # NFS sends what is left, and says here that there is no room
            os.rename(staged, target)  # noqa: PTH104 - both are strings
        except BaseException:
            Path(staged).unlink(missing_ok=True)
            raise

    def _check_presence(self) -> None:
        """Tell an empty directory from one that is no longer mounted, into whose place nothing may be written."""
        if os.access(f"{self._root}/{STATE}", os.F_OK):
            return
        if Path(self._root).stat().st_dev != self._device:
            raise TierUnavailable(f"{self._root} is on another file system than at the start: is it mounted?")
        if self._may_write:
            Path(f"{self._root}/{STATE}").mkdir(exist_ok=True)

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`."""
        count = 0
        with translated("delete", self._root):
            for path in map(key_path, keys):
                if path is None:
                    continue
                try:
                    Path(f"{self._root}/{path}").unlink()
                    count += 1
                except OSError as error:
                    if error.errno not in _GONE:
                        raise
            if not count:
                self._check_presence()
        return count

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`."""
        with translated("scan", self._root):
            self._check_presence()
            for key, _ in key_files(self._root, prefix, STATE):
                yield key

    def stats(self) -> TierStats:
        """See :class:`Tier`. What the last cleaning found, and what this process has written since."""
        last = self._cleaner.last
        used = None if last is None else last.used_bytes + self._cleaner.written_bytes
        return TierStats(used_bytes=used, budget_bytes=self.options.max_bytes)

    def describe(self) -> str:
        return f"directory {self._root}"

    def close(self) -> None:
        with translated("close", self._root):
            self._cleaner.close()
