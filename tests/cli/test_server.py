"""``kvstrata server`` as a process."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from kvstrata.cli import main
from kvstrata.testing.process import ServerFailed, ServerProcess, free_port


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def server(tmp_path: Path, port: int, http_port: int, *arguments: str) -> ServerProcess:
    command = [sys.executable, "-m", "kvstrata.cli", "server", "--l1-size-gb", "0.01", "--json"]
    command += [
        "--set",
        f"runtime_dir={tmp_path}",
        "--port",
        str(port),
        "--http-port",
        str(http_port),
        *arguments,
    ]
    return ServerProcess(
        "kvstrata server", command, log_path=tmp_path / f"{port}.log", ready=lambda: healthy(http_port)
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end(number: signal.Signals, tmp_path: Path) -> None:
    port, http_port = free_port(), free_port()
    arguments = ("--eviction-policy", "LRU", "--chunk-size", "16", "--local-disk", str(tmp_path / "kv"))
    with server(tmp_path, port, http_port, *arguments) as process:
        lines = process.log_path.read_text().splitlines()
        about = json.loads(next(line for line in lines if line.startswith("{")))
        assert about["pid"] == process.pid
        assert (about["url"], about["http"]) == (f"tcp://127.0.0.1:{port}", f"http://127.0.0.1:{http_port}")
        assert about["tiers"] == ["l1", "disk"]
        process.kill(number)
        deadline = time.monotonic() + 20
        while process.running and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.returncode == 0
        assert "Traceback" not in process.log_tail(1000)


def test_a_port_in_use_ends_in_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = server(tmp_path, port, free_port())
        with pytest.raises(ServerFailed):
            process.start()
    log = process.log_tail(1000)
    (line,) = [line for line in log.splitlines() if line.startswith("kvstrata: ")]
    assert str(port) in line
    assert "in use" in line
    assert "Traceback" not in log
    assert process.returncode in (1, 2)


@pytest.mark.parametrize("host", ["300.1.2.3", "192.0.2.1"])
def test_an_address_of_another_machine_is_told_from_a_port_in_use(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["server", "--host", host, "--port", "5555", "--l1-size-gb", "0.01"]
    assert main([*command, "--set", f"runtime_dir={tmp_path}"]) == 2
    assert "this machine has no such address" in capsys.readouterr().err


def test_it_serves_on_ipv6(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "kvstrata.cli", "server", "--l1-size-gb", "0.01", "--json"]
    command += ["--set", f"runtime_dir={tmp_path}", "--port", str(port), "--http-port", "0"]
    log_path = tmp_path / "log"
    arguments = ("--host", "::1", "--http-host", "::1")
    with ServerProcess(
        "kvstrata server",
        [*command, *arguments],
        log_path=log_path,
        ready=lambda: "{" in log_path.read_text(),
    ):
        about = json.loads(next(line for line in log_path.read_text().splitlines() if line.startswith("{")))
        assert about["url"] == f"tcp://[::1]:{port}"
        for url in (about["url"], about["http"]):
            assert main(["ping", url, "--count", "1"]) == 0


def test_a_second_server_on_its_sockets_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with server(tmp_path, port, free_port()):
        command = ["server", "--port", str(port), "--l1-size-gb", "0.01", "--set", f"runtime_dir={tmp_path}"]
        assert main(command) == 1
    line = capsys.readouterr().err
    assert "another kvstrata server is running" in line
    assert "choose another port (--port) or another runtime_dir" in line


def test_a_directory_for_sockets_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    command = ["server", "--port", str(free_port()), "--l1-size-gb", "0.01"]
    assert main([*command, "--set", f"runtime_dir={tmp_path}/file"]) == 1
    assert "set runtime_dir to a directory of this user" in capsys.readouterr().err


def test_a_tier_that_cannot_be_opened_ends_in_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    process = server(tmp_path, free_port(), free_port(), "--local-disk", str(tmp_path / "file"))
    with pytest.raises(ServerFailed):
        process.start()
    log = process.log_tail(1000)
    (line,) = [line for line in log.splitlines() if line.startswith("kvstrata: ")]
    assert str(tmp_path / "file") in line
    assert "Traceback" not in log
    assert process.returncode == 2
