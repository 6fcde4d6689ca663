"""Where files are written before they get their name."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import time
from pathlib import Path

from kvstrata.tiers.files import entries_of

log = logging.getLogger(__name__)

STAGING = ".kvstrata-staging"
"""Directory of unfinished files; one subdirectory per writer, locked while the writer lives."""
STAGING_AGE_SECONDS = 3600.0
"""Unfinished files without a lock are left alone until they are this old."""


class Staging:
    """This writer's directory of unfinished files, beside those of others. Thread-safe.

    A lock on a file in it tells that the writer lives; the kernel drops the lock with the process.
    """

    def __init__(self, root: str) -> None:
        self._root = f"{root}/{STAGING}"
        self._numbers = itertools.count()
        self._lock_fd = -1
        while self._lock_fd < 0:
            self._directory = f"{self._root}/{secrets.token_hex(8)}"
            Path(self._directory).mkdir(parents=True)
            self._lock_fd = _locked(f"{self._directory}/lock", os.O_CREAT)

    def create(self) -> tuple[int, str]:
        """Open a new file for writing."""
        path = f"{self._directory}/{next(self._numbers)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600), path
        except FileNotFoundError:
            # Someone deleted the directory below us. Without the lock its age alone protects it.
            Path(self._directory).mkdir(parents=True, exist_ok=True)
            return os.open(path, flags, 0o600), path

    def remove_orphans(self) -> int:
        """Delete what writers left that are gone, or that hold no lock and are old; how many others live."""
        num_others = 0
        for entry in entries_of(self._root):
            if entry.path != self._directory and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):  # others that start now do the same
                    num_others += not _removed_if_orphaned(entry)
        return num_others

    def close(self) -> None:
        if self._lock_fd >= 0:
            _remove_directory(self._directory)
            os.close(self._lock_fd)
            self._lock_fd = -1


def _locked(path: str, flags: int = 0) -> int:
    """Open and lock a lock file; -1 when another holds it or deletes it at this moment."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return -1


def _removed_if_orphaned(entry: os.DirEntry[str]) -> bool:
    """False when its writer lives. Without a lock nobody knows: that goes, too, but only when it is old."""
    try:
        fd = _locked(f"{entry.path}/lock")
    except FileNotFoundError:
        if time.time() - entry.stat().st_mtime >= STAGING_AGE_SECONDS:
            _remove_directory(entry.path)
        return True
    if fd < 0:
        return False
    try:
        _remove_directory(entry.path)
    finally:
        os.close(fd)
    return True


def _remove_directory(path: str) -> None:
    """Delete a staging directory and its files; others may do so at the same time."""
    try:
        for entry in entries_of(path):
            Path(entry.path).unlink(missing_ok=True)
        Path(path).rmdir()
    except OSError as error:
        log.debug("staging directory %s stays: %s", path, error)
