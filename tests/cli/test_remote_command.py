"""``kvstrata remote`` as a process."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
from pathlib import Path

import pytest

from kvstrata.cli import main
from kvstrata.testing.process import ServerFailed, ServerProcess
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.tiers.lm import LmOptions, LmTier


def server(tmp_path: Path, *arguments: str, port: int = 0, host: str = "127.0.0.1") -> ServerProcess:
    command = [sys.executable, "-m", "kvstrata.cli", "remote", host, str(port), *arguments]
    log = tmp_path / f"remote-{len(list(tmp_path.iterdir()))}.log"
    command += ["--json", "--max-size-gb", "0.1"]
    return ServerProcess("kvstrata remote", command, log_path=log, ready=lambda: '{"pid"' in log.read_text())


def about(process: ServerProcess) -> dict[str, object]:
    lines = process.log_path.read_text().splitlines()
    return json.loads([line for line in lines if line.startswith("{")][-1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end_and_keeps_what_it_has(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    arguments = ["cpu", "--disk", str(tmp_path / "kv"), "--token-file", str(tmp_path / "token")]
    arguments += ["--ttl-seconds", "1000", "--eviction-policy", "S3FIFO"]
    keys, frames = make_keys(10), [make_frame(1_000_000, seed) for seed in range(10)]
    for _ in range(2):
        with server(tmp_path, *arguments) as process:
            said = about(process)
            assert said["pid"] == process.pid
            options = LmOptions(url=said["url"], token_file=str(tmp_path / "token"))
            with contextlib.closing(LmTier(options)) as tier:
                if not any(tier.contains(keys)):
                    tier.write(keys, frames)
                assert read_frames(tier, keys) == [bytes(frame) for frame in frames]
            process.kill(number)
            assert process.wait_until_ended(20)
            assert process.returncode == 0
        log = process.log_tail(1000)
        assert "stopped" in log
        assert not any(word in log for word in ("Traceback", "WARNING", "secret"))


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = server(tmp_path, port=port)
        with pytest.raises(ServerFailed):
            process.start()
    log = process.log_tail(1000)
    (line,) = [line for line in log.splitlines() if line.startswith("kvstrata: ")]
    assert str(port) in line
    assert "in use" in line
    assert "Traceback" not in log
    assert process.returncode in (1, 2)


def test_without_a_token_for_everybody_is_said(tmp_path: Path) -> None:
    with server(tmp_path, host="0.0.0.0") as process:
        log = process.log_tail(1000)
    assert "open to everybody" in log
    assert "--token-file" in log


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["cuda"], "device 'cuda'"),
        (["cpu", "--eviction-policy", "none"], "there is lru"),
        (["--max-size-gb", "0"], "--max-size-gb 0"),
        (["--max-size-gb", "inf"], "--max-size-gb inf"),
        (["--max-size-gb", "1000000"], "memory"),
        (["--token-file", "/nowhere"], "token file '/nowhere' cannot be read"),
        (["--tls-cert", "/nowhere"], "certificate '/nowhere'"),
        (["--tls-key", "/nowhere"], "--tls-cert"),
        (["--disk", "/dev/null"], "cannot be used"),
        (["--max-frame-mb", "4096"], "--max-frame-mb"),
        (["--ttl-seconds", "0"], "--ttl-seconds"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["remote", "127.0.0.1", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvstrata: ")
    assert error.count("\n") == 1
    assert text in error


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remote", host, "1"]) == 2
    assert f"cannot listen on {host}:1" in capsys.readouterr().err
