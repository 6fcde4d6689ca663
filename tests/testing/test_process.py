"""Servers as children: nothing of them outlives their owner."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from kvstrata.testing.process import ServerFailed, ServerProcess, free_port

FAMILY = """
import subprocess, sys, time
# A grandchild in a session of its own, whose parent ends at once, and which ignores SIGTERM.
child = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
parent = f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
subprocess.Popen([sys.executable, "-c", "import subprocess, sys; " + parent])
time.sleep(600)
"""

OWNER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_process import family
server = family(Path(sys.argv[1]))
server.start()
print(*server.processes(), flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def family(tmp_path: Path, **options) -> ServerProcess:
    log = tmp_path / "family.log"
    return ServerProcess(
        "family",
        [sys.executable, "-c", FAMILY],
        log_path=log,
        ready=lambda: "up" in log.read_text(),
        grace_seconds=0.5,
        **options,
    )


def test_stop_ends_descendants_that_left_the_session_and_ignore_sigterm(tmp_path):
    with family(tmp_path) as server:
        processes = server.processes()
        assert server.pid in processes
        assert len(processes) >= 2
    assert not [pid for pid in processes if alive(pid)]
    assert not server.running


def test_the_tree_ends_when_its_owner_is_killed(tmp_path):
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            OWNER,
            str(tmp_path),
            str(Path(__file__).parent),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    processes = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(processes) >= 2
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in processes if alive(pid)]


def test_killing_the_server_leaves_its_children_until_stop(tmp_path):
    with family(tmp_path) as server:
        others = [pid for pid in server.processes() if pid != server.pid]
        server.kill(signal.SIGKILL)
        assert server.wait_until_ended()
        assert server.returncode == -signal.SIGKILL
        assert any(alive(pid) for pid in others)
    assert not [pid for pid in others if alive(pid)]


def test_a_server_that_ends_early_is_named_with_the_end_of_its_log(tmp_path):
    server = ServerProcess(
        "cook",
        [sys.executable, "-c", "import sys; print('no pan', file=sys.stderr); sys.exit(7)"],
        log_path=tmp_path / "log",
        ready=lambda: False,
    )
    with pytest.raises(ServerFailed, match=r"cook ended with status 7;(.|\n)*no pan"):
        server.start()
    assert server.processes() == []


def test_a_server_that_is_not_ready_in_time_is_stopped(tmp_path):
    pids = []
    server = ServerProcess(
        "sleeper",
        [sys.executable, "-c", "import time; time.sleep(600)"],
        log_path=tmp_path / "log",
        ready=lambda: bool(pids.append(server.pid)),
        start_timeout_seconds=0.2,
    )
    with pytest.raises(ServerFailed, match="sleeper was not ready after"):
        server.start()
    assert pids[0] > 0
    assert not alive(pids[0])


def test_a_command_that_does_not_exist_is_a_failed_server(tmp_path):
    server = ServerProcess("ghost", ["/nonexistent/program"], log_path=tmp_path / "log", ready=lambda: False)
    with pytest.raises(ServerFailed, match="ghost ended"):
        server.start()


def test_shared_memory_of_a_killed_server_is_unlinked(tmp_path):
    program = (
        "import time\nfrom multiprocessing import resource_tracker, shared_memory\n"
        "memory = shared_memory.SharedMemory(create=True, size=4096)\n"
        "resource_tracker.unregister(memory._name, 'shared_memory')\n"
        "print('name=' + memory.name, flush=True); time.sleep(600)"
    )
    log = tmp_path / "log"
    other = Path(f"/dev/shm/psm_{uuid.uuid4().hex[:8]}")
    other.write_bytes(b"not of that server")
    try:
        with ServerProcess(
            "owner", [sys.executable, "-c", program], log_path=log, ready=lambda: "name=" in log.read_text()
        ) as server:
            name = log.read_text().partition("name=")[2].strip()
            assert Path("/dev/shm", name).exists()
        assert not Path("/dev/shm", name).exists()
        assert other.exists()
        assert not server.running
    finally:
        other.unlink()


def test_variables_can_be_removed_and_added(tmp_path, monkeypatch):
    monkeypatch.setenv("KVSTRATA_ONE", "1")
    log = tmp_path / "log"
    program = (
        "import os, time\nprint(os.environ.get('KVSTRATA_ONE'), os.environ['KVSTRATA_TWO'], flush=True)\n"
        "time.sleep(600)"
    )
    with ServerProcess(
        "reader",
        [sys.executable, "-c", program],
        log_path=log,
        env={"KVSTRATA_ONE": None, "KVSTRATA_TWO": "2"},
        ready=lambda: "None 2" in log.read_text(),
    ):
        pass


def test_free_ports_are_free_and_nobody_gets_them_by_chance():
    ports = [free_port() for _ in range(500)]
    assert len(set(ports)) == 500, "none comes twice"
    with socket.create_server(("127.0.0.1", ports[0])), socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        assert max(ports) < any_port.getsockname()[1]
