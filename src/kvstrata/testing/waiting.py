"""Waiting for what must come about, and work that goes on beside a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
PATIENCE_SECONDS = 20.0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for something that must come about.

    Raises:
        AssertionError: it does not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def retried(call: Callable[[], T], error: type[Exception], seconds: float = PATIENCE_SECONDS) -> T:
    """What ``call`` returns, once it does not raise ``error`` any more: something has to come back first, or has a
    deadline so short that a busy machine misses it now and then.

    Raises:
        Exception: the last ``error``, when that takes longer than ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except error:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@contextmanager
def repeating(*steps: Callable[[], object], pause_seconds: float = 0.001) -> Iterator[list[BaseException]]:
    """Call each of ``steps`` again and again until the block ends, in a thread of its own.

    What one of them raises ends its thread, is seen in the list at once, and is raised when the block has ended.
    """
    stopping = threading.Event()
    failures: list[BaseException] = []

    def work(step: Callable[[], object]) -> None:
        try:
            while not stopping.wait(pause_seconds):
                step()
        except BaseException as error:  # noqa: BLE001  raised by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
