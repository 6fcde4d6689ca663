"""Keeps a shared directory within its budget: one participant at a time walks it, in slices, within its own writes.

Nobody knows what all hosts have written, so each may write only its **quota** until somebody has cleaned; half of
it makes a participant clean itself. A cleaning counts what there is by time of use, and deletes the least recently
used until seven eighths of the budget are left. The quota is an eighth of what was then free up to there, and at
least a 64th of the budget (or one frame). So four participants stay within the budget together, and each further
one may add a 32nd of it, or two frames where those are larger.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from kvstrata.errors import TierFull
from kvstrata.tiers.file.clock import ServerClock
from kvstrata.tiers.file.state import STATE, Cleaned, Lease, Record
from kvstrata.tiers.files import entries_of
from kvstrata.tiers.paths import path_key

SLICE_SECONDS = 0.02
"""How long one write cleans."""
PATIENCE_SECONDS = 1.0
"""How long a write that is beyond its quota cleans, or waits for another's cleaning, before it is refused."""
INTERVAL_SECONDS = 600.0
"""Cleaned at least this often by those who write, for what expires and what dead writers left."""
UNFINISHED_SECONDS = 3600.0
"""Unfinished files are left alone until they are this old."""
UNFINISHED = re.compile(r"\.[A-Za-z0-9._-]+\.new")


class Cleaner:
    """This participant's part in keeping the budget. Thread-safe."""

    def __init__(self, root: str, max_bytes: int, ttl_seconds: float | None, clock: ServerClock) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._target_bytes = max_bytes - max_bytes // 8
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._record = Record(root)
        self._lease = Lease(root, clock)
        self._lock = threading.Lock()
        self._walk: Generator[None, None, Cleaned] | None = None
        self.last: Cleaned | None = None
        """What the last cleaning found, if there was one."""
        self._note(self._record.news())
        # A newcomer begins as if it had written, lest one that is started again and again never cleans.
        self.written_bytes = self._quota_bytes // 2
        """What this participant has written since then."""

    def _note(self, cleaned: Cleaned | None) -> None:
        free = self._target_bytes - (cleaned.used_bytes if cleaned else self._target_bytes)
        self._quota_bytes = max(self._max_bytes // 64, free // 8)
        self.written_bytes = 0
        self.last = cleaned
        self._noted_at = time.monotonic()

    def admit(self, size: int) -> None:
        """Called before ``size`` bytes are written; cleans for a moment when that is due.

        Raises:
            TierFull: too much was written since the last cleaning, or ``size`` exceeds the budget.
        """
        if size > self._max_bytes:
            raise TierFull(f"frame of {size} bytes, budget of {self._max_bytes} bytes for {self._root}")
        with self._lock:
            due = time.monotonic() - self._noted_at > INTERVAL_SECONDS
            if due or self._walk is not None or self.written_bytes + size > self._quota_bytes // 2:
                self._clean(SLICE_SECONDS)
            if self._is_beyond(size):
                deadline = time.monotonic() + PATIENCE_SECONDS
                while self._is_beyond(size) and (left := deadline - time.monotonic()) > 0:
                    if not self._clean(left):
                        time.sleep(0.01)
                if self._is_beyond(size):
                    raise TierFull(f"cleaning of {self._root} has not kept up with what is written")
            self.written_bytes += size

    def _is_beyond(self, size: int) -> bool:
        return self.written_bytes > 0 and self.written_bytes + size > self._quota_bytes

    def _clean(self, seconds: float) -> bool:
        """Clean for a while, if nobody else does; False when there is nothing to do but wait."""
        news = self._record.news()
        if news is None and self._walk is None:
            if not self._lease.take():
                return False
            news = self._record.news()
            if news is None:
                self._walk = self._cleaning()
            else:
                self._lease.release()
        if news is not None:
            self._note(news)
            return True
        return self._walk is not None and self._go_on(self._walk, time.monotonic() + seconds)

    def _go_on(self, walk: Generator[None, None, Cleaned], deadline: float) -> bool:
        """Clean until the deadline, or to the end."""
        while time.monotonic() < deadline:
            if not self._lease.renew():
                self._walk = None
                return False
            try:
                next(walk)
            except StopIteration as end:
                self._end(end.value)
                return True
            except OSError:  # the walk has ended here, and has not cleaned: the next one begins anew
                self._walk = None
                self._lease.release()
                raise
        return True

    def _end(self, cleaned: Cleaned) -> None:
        self._walk = None
        self._note(cleaned)
        try:
            self._record.publish(cleaned)
        finally:
            self._lease.release()

    def _cleaning(self) -> Generator[None, None, Cleaned]:
        """Count, then evict. Two walks, so that memory does not grow with the number of files."""
        started = time.monotonic()
        entries, used = 0, 0
        bytes_by_second: dict[int, int] = {}
        for path, status in self._files():
            if not (self._is_dead(path, status) and _removed(path)):
                used += status.st_size
                if not _is_unfinished(path):
                    entries += 1
                    second = _used_at(status)
                    bytes_by_second[second] = bytes_by_second.get(second, 0) + status.st_size
            yield
        excess = used - self._target_bytes
        if excess > 0:
            newest = _newest_to_go(bytes_by_second, excess)
            for path, status in self._files():
                goes = excess > 0 and not _is_unfinished(path) and _used_at(status) <= newest
                if goes and _removed(path):
                    excess -= status.st_size
                    used -= status.st_size
                    entries -= 1
                yield
        return Cleaned(used, entries, socket.gethostname(), time.monotonic() - started)

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Frames and unfinished files. What is not ours is left alone."""
        pending = [""]
        while pending:
            relative = pending.pop()
            for entry in entries_of(f"{self._root}/{relative}"):
                path = f"{relative}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    if path != STATE:
                        pending.append(path + "/")
                elif path.count("/") >= 3 and (UNFINISHED.fullmatch(entry.name) or path_key(path)):
                    try:
                        yield entry.path, entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue

    def _is_dead(self, path: str, status: os.stat_result) -> bool:
        age = self._clock.now() - status.st_mtime
        if _is_unfinished(path):
            return age > UNFINISHED_SECONDS
        return self._ttl_seconds is not None and age > self._ttl_seconds

    def close(self) -> None:
        """Leave a cleaning that is under way to others."""
        with self._lock:
            self._walk = None
            self._lease.release()


def _removed(path: str) -> bool:
    """Delete a file; False when it must stay, as it is not ours to delete."""
    try:
        Path(path).unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def _is_unfinished(path: str) -> bool:
    return path.endswith(".new")


def _used_at(status: os.stat_result) -> int:
    """When a frame was used last. Reads set the access time themselves, so that ``noatime`` does not matter."""
    return int(max(status.st_atime, status.st_mtime))


def _newest_to_go(bytes_by_second: dict[int, int], excess: int) -> int:
    """The second up to which frames are to go to free ``excess`` bytes."""
    for second, size in sorted(bytes_by_second.items()):
        excess -= size
        if excess <= 0:
            return second
    return max(bytes_by_second, default=0)
