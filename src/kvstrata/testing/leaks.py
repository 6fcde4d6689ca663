"""Fixtures that fail a test which leaves a thread, descriptor, child process or shared-memory file behind.

Use it as a plug-in: ``pytest_plugins = ["kvstrata.testing.leaks"]`` in ``conftest.py``. Then every test is
checked. A test that must leave something is marked ``@pytest.mark.leaks_allowed("reason")``. Fixtures of a
wider scope are set up before the snapshot and may keep what they have.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

GRACE_SECONDS = 3.0
"""How long what ends by itself may take to end."""
_STEP_SECONDS = 0.02
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only looked at


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks_allowed(reason): the test may leave resources behind")


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare what this process holds after the test with before."""
    if request.node.get_closest_marker("leaks_allowed"):
        yield
        return
    before = snapshot()
    yield
    leaked = leaked_since(before)
    if leaked:
        pytest.fail("left behind: " + ", ".join(sorted(leaked)), pytrace=False)


def leaked_since(before: set[str], grace_seconds: float = GRACE_SECONDS) -> set[str]:
    """What is held now, and still after the grace period, but was not ``before``."""
    leaked = snapshot() - before
    if leaked:
        gc.collect()  # a cycle that holds a socket is freed some time; it is no leak
    deadline = time.monotonic() + grace_seconds
    while leaked and time.monotonic() < deadline:
        time.sleep(_STEP_SECONDS)
        leaked = snapshot() - before
    return leaked


def snapshot() -> set[str]:
    """Everything held now, one readable line each."""
    return {*_threads(), *_descriptors(), *_children(), *_shared_memory()}


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        yield f"thread {thread.name} ({thread.ident})"


def _descriptors() -> Iterator[str]:
    directory = Path("/proc/self/fd")
    for name in os.listdir(directory):  # noqa: PTH208 - paths are made below, after the listing is closed
        try:
            target = (directory / name).readlink()
        except FileNotFoundError:  # that of the listing itself
            continue
        yield f"descriptor {name} -> {target}"


def _children() -> Iterator[str]:
    own = os.getpid()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            head, _, rest = (directory / "stat").read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent = rest.split()[:2]
        if int(parent) == own:
            # A zombie has ended, but was not waited for: that is left behind as well.
            name = head.partition("(")[2] + (" (zombie)" if state == "Z" else "")
            yield f"child process {directory.name} {name}"


def _shared_memory() -> Iterator[str]:
    # Others use the directory too; only what carries our name can be ours.
    if _SHARED_MEMORY.is_dir():
        for path in _SHARED_MEMORY.iterdir():
            if "kvstrata" in path.name:
                yield f"shared memory {path}"
