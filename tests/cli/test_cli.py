"""Exit statuses, JSON, help and errors of every command, as a person meets them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstrata import __version__
from kvstrata.cli import main
from kvstrata.config import SETTINGS

COMMANDS = [
    ("server",),
    ("remote",),
    ("config", "show"),
    ("config", "check"),
    ("keys", "list"),
    ("keys", "count"),
    ("keys", "show"),
    ("keys", "delete"),
    ("status",),
    ("tiers",),
    ("clear",),
    ("pin",),
    ("unpin",),
    ("pins",),
    ("warm",),
    ("verify",),
    ("jobs",),
    ("runtime",),
    ("ping",),
    ("size",),
    ("doctor",),
    ("version",),
]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("KVSTRATA_", "LMCACHE_")):
            monkeypatch.delenv(name)


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstrata.cli", *arguments],
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a failed command left on standard error."""
    captured = capsys.readouterr()
    assert captured.err.startswith("kvstrata: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_installed_command_and_its_version() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("kvstrata"), "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"kvstrata {__version__}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["version"] == __version__
    assert "redis" in answer["tiers"]
    assert main(["version"]) == 0
    assert "tiers: disk, " in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_json(
    command: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Usage: kvstrata {' '.join(command)}" in text
    assert (
        f"Example: {'LMCACHE_CHUNK_SIZE=128 ' if command[1:] == ('show',) and command[0] == 'config' else ''}"
        in text
    )
    assert f"kvstrata {' '.join(command)}" in text.partition("Example: ")[2]
    assert "--json" in text


@pytest.mark.parametrize("group", [[], ["bench"], ["config"], ["keys"], ["metrics"], ["quota"]])
def test_the_list_of_commands_is_not_cut_off(
    group: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*group, "--help"]) == 0
    _, heading, commands = capsys.readouterr().out.partition("Commands:")
    assert heading
    assert "..." not in commands


def test_without_arguments_it_shows_help_and_fails() -> None:
    for arguments in ((), ("config",), ("keys",)):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Commands:" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["keys", "lst"], "No such command 'lst'"),
        (["config", "show", "--jsn"], "No such option"),
        (["config", "check"], "Missing argument"),
        (["keys", "list", "--limit", "0"], "--limit"),
        (["server", "--chunk-size", "x"], "--chunk-size"),
        (["server", "--chunk-size", "0"], "chunk_size = 0 (from argument) is not allowed"),
        (["server", "--eviction-policy", "ARC"], "there is lru, s3fifo"),
        (["server", "--remote-url", "gopher://:geheim@h:1"], "remote_url = 'gopher://:***@h:1'"),
        (["server", "--set", "gate"], "expected KEY=VALUE"),
        (["server", "--set", "gat=1"], "did you mean 'gate'?"),
        (["server", "--set", "port=1", "--port", "2"], "port is given twice"),
        (["server", "--config", "/nowhere.yaml"], "configuration file /nowhere.yaml cannot be read"),
        (["keys", "list"], "no tier is configured; give --tier URL"),
        (["keys", "list", "--tier", "far"], "no tier 'far' is configured"),
        (["keys", "list", "--tier", "s4://x"], "this version has tiers for"),
        (["keys", "list", "--tier", "file:///nowhere"], "there is no directory /nowhere"),
        (["keys", "show", "x", "--tier", "redis://h"], "not a key of kvstrata: 'x'"),
        (["keys", "delete", "x", "--tier", "redis://h"], "nobody to ask: add --yes"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = error_line(capsys)
    assert message in line
    assert "geheim" not in line


def test_wrong_configuration_as_a_process() -> None:
    done = run("config", "show", env={"KVSTRATA_CHUNK_SIZE": "many"})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"kvstrata: chunk_size = 'many' \(from environment variable KVSTRATA_CHUNK_SIZE\).*\n", done.stderr
    )


def test_config_show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_REMOTE_URL", "redis://:geheim@127.0.0.1:1")
    monkeypatch.setenv("KVSTRATA_CHUNK_SIZE", "64")
    monkeypatch.setenv("LMCACHE_ENABLE_P2P", "true")
    assert main(["config", "show"]) == 0
    shown = capsys.readouterr()
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line}
    assert re.fullmatch(r"chunk_size +64 +environment variable KVSTRATA_CHUNK_SIZE +256", lines["chunk_size"])
    assert set(SETTINGS) <= set(lines)
    assert "redis://:***@127.0.0.1:1" in lines["remote_url"]
    assert shown.out.endswith("tiers, in the order they are asked: l1, redis\n")
    assert "enable_p2p" in shown.err
    assert main(["config", "show", "--json"]) == 0
    text = capsys.readouterr().out
    answer = json.loads(text)
    assert answer["settings"]["chunk_size"] == {
        "value": 64,
        "source": "environment variable KVSTRATA_CHUNK_SIZE",
        "default": 256,
    }
    assert [tier["kind"] for tier in answer["tiers"]] == ["redis"]
    assert len(answer["notices"]) == 1
    assert "geheim" not in text + shown.out + shown.err


def test_config_show_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("chunk_size: 32\n")
    assert main(["config", "show", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["chunk_size"]["source"] == f"file {file}"


def test_config_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_CHUNK_SIZE", "wrong, but not in the file")
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("chunk_size: 256\nenable_blending: true\n")
    bad.write_text("chunk_sise: 256\n")
    assert main(["config", "check", str(good)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{good}: ok\n"
    assert "enable_blending" in shown.err
    assert main(["config", "check", str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert main(["config", "check", str(bad)]) == 2
    assert "did you mean 'chunk_size'?" in error_line(capsys)
    assert main(["config", "check", str(bad), "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], "chunk_sise" in answer["error"]) == (False, True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "remote_url: redis://h\nremote_serde: aesgcm\n",
            "codec 'aesgcm' needs keys: set encryption_key_file",
        ),
        ("encryption_key_file: /no/such\n", "/no/such"),
        ("local_cpu: false\n", "local_cpu is false and there is no other tier"),
    ],
)
def test_config_check_notes_what_no_server_starts_with(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    assert main(["config", "check", str(file)]) == 0  # the rest may come from the environment
    shown = capsys.readouterr()
    assert shown.out == f"{file}: ok\n"
    assert "with this file alone a server does not start" in shown.err
    assert said in shown.err


def test_config_check_of_what_is_no_redis_conf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary.conf").write_bytes(b"\xff")
    for name, said in (("binary.conf", "not UTF-8"), ("nowhere.conf", "No such file")):
        assert main(["config", "check", str(tmp_path / name)]) == 2
        assert said in error_line(capsys)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://AKIA:geheim@bucket/p", "credentials in the URL are refused"),
        ("file:///srv/kv", "must have `max_bytes`, in {'path': '/srv/kv'}"),
    ],
)
def test_config_check_finds_wrong_urls(
    url: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"remote_url: {url}\n")
    assert main(["config", "check", str(file)]) == 2
    line = error_line(capsys)
    assert said in line
    assert "geheim" not in line


def test_config_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "docs"]) == 0
    assert capsys.readouterr().out.startswith("# Configuration\n")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m kvstrata.cli config docs | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("# Configuration\n", "")
