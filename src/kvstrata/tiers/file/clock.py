"""The time as the file server has it."""

from __future__ import annotations

import os
import time


class ServerClock:
    """What the server wrote into a file, and the time since then by this host's monotonic clock. Ages of files are
    then right on hosts whose clocks differ or are set."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def learn(self, fd: int) -> None:
        """Have the server set a file's times to its own now, and take them over. The file must be our own."""
        os.utime(fd)
        self._offset = os.fstat(fd).st_mtime - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._offset
