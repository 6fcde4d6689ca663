"""The disk tier: one file per frame below a directory.

``<path>/<engine@model@world size, quoted>/<worker>/<first two digits>/<chunk hash>.kv``

The file system is the truth: a frame appears by a rename and disappears by an unlink, so a process that dies
at any instant leaves whole frames only. The index in memory serves the byte budget and the order of eviction;
where it disagrees with the file system (another process shares the directory, someone deleted files), reading
sets it right, so that what a look-up promised is a miss then. Checksums are verified above the tiers.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from kvstrata.config.tiers import NO_BUDGET_BYTES
from kvstrata.errors import ConfigError, TierFull
from kvstrata.frame import HEADER_BYTES, salt_id_in
from kvstrata.quotas import Quota, Usage
from kvstrata.tiers.base import QuotaTier, TierOptions
from kvstrata.tiers.disk.index import FILES_AT_ONCE, Index
from kvstrata.tiers.disk.staging import STAGING, Staging
from kvstrata.tiers.files import (
    FULL,
    NO_WRITES,
    allocate,
    key_files,
    read_into,
    rename_into,
    translated,
    write_all,
)
from kvstrata.tiers.paths import key_path, path_to_write
from kvstrata.types import Miss, MissReason, TierStats

log = logging.getLogger(__name__)


class DiskOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the disk tier."""

    path: str
    """The directory; made when absent. Files in it that are not ours are never touched."""
    max_bytes: int
    """Byte budget of all frames in the directory, as far as this process knows of them."""
    shared: bool = False
    """Whether look-ups see what other processes wrote to the directory since the start of this one.

    Each key then costs a system call (2 to 4 microseconds, more when other Python threads are busy).
    """
    fsync: bool = False
    """Wait for the device on each write. Without it a power failure turns recent frames into misses."""


class DiskTier(QuotaTier):
    """Frames in files, bounded in bytes, least recently used evicted first."""

    kind: ClassVar[str] = "disk"
    Options: ClassVar[type[TierOptions]] = DiskOptions

    def __init__(self, options: DiskOptions) -> None:
        """Open the directory and rebuild the index from what it holds.

        Raises:
            ConfigError: the path or the budget cannot be used.
        """
        if options.max_bytes <= 0:
            raise ConfigError(f"max_bytes of the disk tier is {options.max_bytes}; it must be positive")
        self.options = options
        self._root = str(Path(options.path).expanduser().absolute())
        self._index = Index(options.max_bytes)
        try:
            Path(self._root).mkdir(parents=True, exist_ok=True)
            self._staging = Staging(self._root)
            num_others = self._staging.remove_orphans()
            self._rebuild()
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"path of the disk tier, {options.path!r}, cannot be used: {reason}") from error
        if num_others and not options.shared and options.max_bytes < NO_BUDGET_BYTES:
            log.warning(
                "%d other process(es) have %s open: each keeps max_bytes for itself, and finds what others write "
                "after a restart only; give each a directory, or use file:// (docs/shared-directory.md)",
                num_others,
                self._root,
            )

    def _rebuild(self) -> None:
        """Fill the index with what the directory holds, oldest use first, and evict what is over budget."""
        found: list[tuple[float, str, int]] = []
        for key, entry in key_files(self._root, "", STAGING):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            found.append((max(status.st_atime, status.st_mtime), key, status.st_size))
        found.sort()
        for _, key, size in found:
            self._index.used(key, size, 0.0)
        self._unlink(self._index.trim())

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. From the index, or with the option ``shared`` from the file system."""
        index, root = self._index, self._root
        if not self.options.shared:
            return [index.size(key) is not None for key in keys]
        paths = map(key_path, keys)
        return [path is not None and os.access(f"{root}/{path}", os.F_OK) for path in paths]

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`. The kernel copies from the page cache or the device into ``buffers``."""
        with translated("read", self._root):
            return [self._read(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _read(self, key: str, buffer: memoryview) -> int | Miss:
        path = key_path(key)
        if path is None:
            return Miss(MissReason.ABSENT)
        try:
            fd = os.open(f"{self._root}/{path}", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return Miss(MissReason.EVICTED if self._index.removed(key) else MissReason.ABSENT)
        try:
            count = self._load(fd, buffer, self._index.size(key))
            if count > len(buffer):
                return Miss(MissReason.CORRUPT, f"file larger than {len(buffer)} bytes")
            if self._index.used(key, count, time.monotonic(), salt_id_in(buffer[:count])):
                _touch(fd)
        except OSError as error:
            if (
                error.errno == errno.EIO
            ):  # a bad sector: the device would fail with it each time it is asked for
                with contextlib.suppress(OSError):
                    self._unlink([key])
            raise
        finally:
            os.close(fd)
        return count

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`.

        Raises:
            TierFull: the device or a quota is full and evicting did not help, nothing may be written, a frame
                exceeds the budget, or a key is too long for a path.
            ValueError: not a key.
        """
        with translated("write", self._root, NO_WRITES):
            for key, frame in zip(keys, frames, strict=True):
                self._write(key, frame)

    def _write(self, key: str, frame: memoryview) -> None:
        path = path_to_write(key)
        size = len(frame)
        if size > self.options.max_bytes:
            raise TierFull(f"frame of {size} bytes, disk budget of {self.options.max_bytes} bytes")
        salt_id = salt_id_in(frame)
        victims, fits = self._index.reserve(size, salt_id)
        if not fits:
            self._evict(victims)
            return  # as if it had been evicted at once: that is what its quota, or those of others, ask for
        try:
            self._evict(victims)
            self._with_room(size, salt_id, lambda: self._write_file(f"{self._root}/{path}", frame))
        except BaseException:
            self._index.unreserve(size, salt_id)
            raise
        self._index.written(key, size, salt_id, time.monotonic())
        self._evict(self._index.trim())

    def _with_room(self, size: int, salt_id: bytes, write: Callable[[], None]) -> None:
        """Call ``write``; while the device is full, evict and try again."""
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                victims = self._index.evict(size, salt_id)
                if not victims:
                    raise TierFull(f"no room on the device of {self._root}: {error.strerror}") from error
                self._evict(victims)

    def _write_file(self, target: str, frame: memoryview) -> None:
        fd, path = self._staging.create()
        try:
            try:
                allocate(fd, len(frame))
                self._save(fd, frame)
                if self.options.fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            rename_into(path, target)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
        if self.options.fsync:
            _sync_directory(str(Path(target).parent))

    def _load(self, fd: int, buffer: memoryview, expected: int | None) -> int:
        """Read a file to the start of ``buffer``; more than its length when the file is larger."""
        return read_into(fd, buffer, expected)

    def _save(self, fd: int, frame: memoryview) -> None:
        """Write a frame to a new file, whose blocks are allocated."""
        write_all(fd, frame)

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`."""
        with translated("delete", self._root):
            return self._unlink(keys)

    def _evict(self, victims: Sequence[str]) -> None:
        """Delete what the index has given up. What the device does not let go is held and counted as before."""
        try:
            self._unlink(victims)
        except OSError:
            for key in victims:
                with contextlib.suppress(OSError):  # this one is gone
                    size = Path(f"{self._root}/{key_path(key)}").stat().st_size
                    self._index.used(key, size, 0.0, self._owner(key))
            raise

    def _unlink(self, keys: Sequence[str]) -> int:
        count = 0
        for key in keys:
            path = key_path(key)
            if path is None:
                continue
            self._index.removed(key)
            try:
                Path(f"{self._root}/{path}").unlink()
                count += 1
            except (FileNotFoundError, NotADirectoryError):
                continue
        return count

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`."""
        with translated("scan", self._root):
            for key, _ in key_files(self._root, prefix, STAGING):
                yield key

    def size(self, key: str) -> int | None:
        """Bytes of ``key``'s frame, None when this process knows of none. From the index, without a system call."""
        return self._index.size(key)

    def held_keys(self) -> list[str]:
        """The keys that this process knows of. From the index, without a look at the directory."""
        return self._index.keys()

    def stats(self) -> TierStats:
        """See :class:`Tier`. What this process knows of, without a look at the directory."""
        entries, used = self._index.totals()
        return TierStats(entries=entries, used_bytes=used, budget_bytes=self.options.max_bytes)

    def set_quotas(self, quotas: Mapping[bytes, Quota], default: Quota | None) -> None:
        """See :class:`QuotaTier`. The first time, the headers of files from before this process are read."""
        if quotas or default is not None:
            keys = self._index.ownerless()
            for at in range(0, len(keys), FILES_AT_ONCE):
                self._index.own({key: self._owner(key) for key in keys[at : at + FILES_AT_ONCE]})
        with translated("delete", self._root):
            for victims in self._index.change_quotas(quotas, default):
                self._evict(victims)

    def _owner(self, key: str) -> bytes:
        """The id of the salt in a file's header; none when it cannot be read."""
        try:
            with Path(f"{self._root}/{key_path(key)}").open("rb", buffering=0) as file:
                return salt_id_in(memoryview(file.read(HEADER_BYTES)))
        except OSError:
            return b""

    def usage(self, salt_id: bytes | None) -> Usage:
        """See :class:`QuotaTier`."""
        return self._index.usage(salt_id)

    def describe(self) -> str:
        return f"disk {self._root}"

    def close(self) -> None:
        self._staging.close()


def _touch(fd: int) -> None:
    """Note a use in the file's times. Not on a file of another owner, or a device that has become read-only: there
    it goes a little earlier."""
    with contextlib.suppress(OSError):
        os.utime(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
