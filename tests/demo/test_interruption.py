"""However the demo ends, everything it started ends with it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from kvstrata.testing.model import smollm2

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
CACHE = Path(__file__).parents[2] / ".cache"
MARK = "DEMO_TEST_RUN"  # not KVSTRATA_...: these are settings


def processes_of(run: str) -> dict[int, str]:
    """All living processes that inherited this run's mark, with their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={run}".encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_nothing_outlives_the_demo(number, tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    model = smollm2(CACHE)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / model.name).symlink_to(model)
    run = uuid.uuid4().hex
    monkeypatch.setenv(MARK, run)
    with (tmp_path / "err").open("w") as err:
        demo = subprocess.Popen(
            [sys.executable, "-m", "kvstrata.cli", "demo", "--cache-dir", str(tmp_path)], stderr=err
        )
    try:
        # Two vLLMs with all their processes, or at least on their way there, and a Valkey.
        wait_until(lambda: sum("VLLM::" in command for command in processes_of(run).values()) >= 2, 240)
        assert len(processes_of(run)) >= 6, (tmp_path / "err").read_text()
    finally:
        demo.send_signal(number)
        status = demo.wait(60)
    wait_until(lambda: not processes_of(run), 30)
    assert processes_of(run) == {}
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130)
