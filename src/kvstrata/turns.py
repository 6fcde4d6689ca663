"""Long work on what a lock guards, in steps, so that it keeps nobody from it for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def take_turns(lock: threading.Lock, steps: Generator[None, None, T]) -> T:
    """Do all ``steps``, each under one hold of ``lock``; return what they return."""
    while True:
        with lock:
            try:
                next(steps)
            except StopIteration as end:
                answer: T = end.value
                return answer
        # Nobody hands a lock over: without this its old holder is the first to take it again.
        time.sleep(0)
