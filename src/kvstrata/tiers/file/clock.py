"""The time as the file server has it."""

from __future__ import annotations

import os
import time


class ServerClock:
    """This host's clock, corrected by what the server wrote into files. Ages of files are then right on hosts whose
    clocks differ."""

    def __init__(self) -> None:
        self._offset = 0.0

    def learn(self, fd: int) -> None:
        """Have the server set a file's times to its own now, and take them over. The file must be our own."""
        os.utime(fd)
        self._offset = os.fstat(fd).st_mtime - time.time()

    def now(self) -> float:
        return time.time() + self._offset
