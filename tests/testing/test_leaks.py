import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from kvstrata.testing.leaks import leaked_since, snapshot


def test_nothing_is_nothing():
    assert leaked_since(snapshot(), 0) == set()


def test_a_thread_a_descriptor_and_a_child_are_seen_until_they_end():
    before = snapshot()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left behind")
    thread.start()
    fd = os.open("/dev/null", os.O_RDONLY)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        leaked = leaked_since(before, 0)
        assert any("left behind" in line for line in leaked)
        assert f"descriptor {fd} -> /dev/null" in leaked
        assert any(line.startswith(f"child process {child.pid} ") for line in leaked)
    finally:
        end.set()
        thread.join()
        os.close(fd)
        child.communicate()
    assert leaked_since(before) == set()


def test_a_child_that_nobody_waited_for_is_a_zombie():
    before = snapshot()
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert any(line.endswith("(zombie)") for line in leaked_since(before, 0))
    child.wait()


def test_shared_memory_counts_when_it_carries_our_name():
    before = snapshot()
    paths = [Path(f"/dev/shm/{name}-{os.getpid()}") for name in ("kvstrata-test", "somebody-elses")]
    try:
        for path in paths:
            path.touch()
        assert leaked_since(before, 0) == {f"shared memory {paths[0]}"}
    finally:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def test_what_ends_within_the_grace_period_is_no_leak():
    before = snapshot()
    timer = threading.Timer(0.1, lambda: None)
    timer.start()
    assert leaked_since(before) == set()
    timer.join()
