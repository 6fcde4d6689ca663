"""Long work under a lock, in steps."""

from __future__ import annotations

import threading
from collections.abc import Generator

from kvstrata.turns import take_turns


def test_whoever_waits_for_the_lock_has_it_before_the_steps_end() -> None:
    lock, came = threading.Lock(), threading.Event()

    def come() -> None:
        with lock:
            came.set()

    def steps() -> Generator[None, None, str]:
        assert lock.locked()
        waiting = threading.Thread(target=come)
        waiting.start()
        while not came.is_set():
            yield
        waiting.join()
        return "answer"

    assert take_turns(lock, steps()) == "answer"
    assert not lock.locked()
