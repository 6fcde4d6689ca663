"""What the tiers of files share: system calls, and the errors that they end in."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.paths import SUFFIX, may_hold, path_key

_libc = ctypes.CDLL(None, use_errno=True)
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full device or quota says."""
_NO_ROOM = (*FULL, errno.EFBIG)
NO_WRITES = (*_NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM)
"""What is said to a write where there is no room, or nothing may be written: that is no reason to stop reading."""


@contextmanager
def translated(action: str, root: str, full: Collection[int] = _NO_ROOM) -> Iterator[None]:
    """Turn what the operating system raises into the errors of the tier contract: ``full`` into TierFull."""
    try:
        yield
    except OSError as error:
        text = f"{action} in {root} failed: {error.strerror or error}"
        raise (TierFull(text) if error.errno in full else TierUnavailable(text)) from error


def entries_of(path: str) -> Iterator[os.DirEntry[str]]:
    """The entries of a directory; none when it is gone or not ours to see."""
    try:
        with os.scandir(path) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return


def key_files(root: str, prefix: str, skipped: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files below ``root`` of keys that begin with ``prefix``, without entering directories that hold none,
    nor the one named ``skipped``."""
    pending = [""]
    while pending:
        relative = pending.pop()
        for entry in entries_of(f"{root}/{relative}"):
            path = f"{relative}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if path != skipped and may_hold(path, prefix):
                    pending.append(path + "/")
            elif entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False):
                key = path_key(path) if path.count("/") >= 3 else None
                if key is not None and key.startswith(prefix):
                    yield key, entry


def read_into(fd: int, buffer: memoryview, expected: int | None) -> int:
    """Read a file to the start of ``buffer``; more than its length when the file is larger.

    One system call when the size is the expected one: each gives the interpreter lock away.
    """
    beyond = bytearray(1)
    count = os.preadv(fd, [buffer, beyond], 0)
    if count in (0, expected):
        return count
    while count <= len(buffer):
        more = os.preadv(fd, [buffer[count:], beyond], count)
        if not more:
            break
        count += more
    return count


def allocate(fd: int, size: int) -> None:
    """Allocate the blocks of a new file before it is written, where the file system can do that by itself.

    Measured on ext4: replacing a file is 8 times faster so, as a rename forces out what is not allocated yet. A
    full device shows before anything is written. Not by ``posix_fallocate``: where the file system cannot, as on
    NFS 3, that writes every block once more.
    """
    if size > 0 and _libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR):
            raise OSError(number, os.strerror(number))


def write_all(fd: int, data: memoryview) -> None:
    """Write all of ``data``."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


def rename_into(path: str, target: str) -> None:
    try:
        os.rename(path, target)  # noqa: PTH104 - both are strings; a Path for each costs more than the call
    except FileNotFoundError:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)  # noqa: PTH104
