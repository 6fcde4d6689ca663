"""Threads that run jobs, and the border where whatever a plug-in raises ends."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvstrata.errors import TierError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Workers:
    """Daemon threads that run jobs from one queue, in order. A hung backend must not keep a process alive."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"kvstrata-{name}-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            _, error = attempt(job)
            if error is not None:
                logger.error("a job of %s failed", threading.current_thread().name, exc_info=error)

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self, timeout_seconds: float) -> None:
        """Let queued jobs end, then the threads; give up on what hangs."""
        self.end()
        self.join(time.monotonic() + timeout_seconds)

    def end(self) -> None:
        """The same without waiting."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the threads until ``deadline`` (monotonic); give up on what hangs."""
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def attempt(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The border: whatever a backend raises ends here."""
    try:
        return call(), None
    except TierError as error:
        return None, error
    except Exception as error:  # noqa: BLE001  tiers are plug-ins; their bugs must not end a thread or reach a request
        return None, error
