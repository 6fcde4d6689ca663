"""The commands that operate a running server, on a real one."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.cli import main
from kvstrata.cli import status as status_module
from kvstrata.testing.api import Served, serving
from kvstrata.testing.client import CHUNK_SIZE, Prompt, look, make_namespace, prompt, small_settings, store

TOKEN = "0123456789abcdef-token"
SPACE = make_namespace("org/model")
STORED = prompt(3 * CHUNK_SIZE, 1, SPACE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("server")
    (directory / "token").write_text(TOKEN)
    (directory / "token").chmod(0o600)
    settings = small_settings(
        local_disk=str(directory / "kv"),
        runtime_dir=str(directory),
        http_token_file=str(directory / "token"),
    )
    with serving(settings) as served:
        served.api.wait_job(served.api.post("/clear", {}))  # its thread begins before the first test
        yield served


class Shell:
    """Runs commands against the server."""

    def __init__(self, served: Served, token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._options = ["--url", served.api.url, "--token-file", str(token_file)]
        self._capsys = capsys

    def run(self, *arguments: str, status: int = 0) -> str:
        assert main([*arguments, *self._options]) == status
        return self._capsys.readouterr().out

    def ask(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", status=status))


@pytest.fixture
def shell(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    served.api.wait_job(served.api.post("/clear", {}))
    store(served.client, STORED)
    served.client.stats()
    assert served.server.cache.flush(20)
    return Shell(served, file, capsys)


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps({"tokens": STORED.tokens, "count": len(STORED)}))
    return str(file)


def test_status_and_tiers(served: Served, shell: Shell) -> None:
    look(served.client, "r", STORED)
    text = shell.run("status")
    assert "ok, up" in text
    assert "l1 100.0 %" in text
    assert "disk  up" in text
    found = shell.ask("status")
    assert found["stats"]["sessions"] == 1
    assert [tier["name"] for tier in found["tiers"]] == ["l1", "disk"]
    text = shell.run("tiers")
    assert "disk  write" in text
    assert [tier["entries"] for tier in shell.ask("tiers")["tiers"]] == [3, 3]


def test_status_watches(
    served: Served, shell: Shell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        store(served.client, prompt(CHUNK_SIZE, 50 + len(naps), SPACE))
        if len(naps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(status_module.time, "sleep", sleep)
    assert main(["status", "--watch", "0.5", *shell._options]) == 130
    captured = capsys.readouterr()
    assert captured.out.count("look-ups of") == 3
    assert captured.out.count("stored\n") == 2
    assert naps == [0.5] * 3


def test_a_bypassed_tier_is_shown_and_used_again(shell: Shell) -> None:
    assert "disk" in shell.run("runtime", "--bypass", "disk", "--freeze-stores")
    assert "bypassed: disk" in shell.run("status")
    assert "stores are frozen" in shell.run("status")
    assert shell.ask("runtime", "--gate", "never")["gate"] == "never"
    found = shell.ask(
        "runtime", "--gate", "auto", "--use", "disk", "--thaw-stores", "--l1-budget-gb", "0.0005"
    )
    assert found["bypassed_tiers"] == []
    assert found["l1_budget_bytes"] == int(0.0005 * 2**30)
    shell.ask("runtime", "--l1-budget-gb", str(found["l1_capacity_bytes"] / 2**30))


def test_pin_and_unpin(shell: Shell, tokens: str) -> None:
    pin = shell.ask("pin", "--owner", "ann", "--tokens", tokens, "--seconds", "100")
    assert pin["num_entries"] == 3
    assert "for 1 h" in shell.run("pin", "--owner", "bob", "--key", SPACE.key(STORED.pieces[0].chunk_hash, 0))
    assert [each["owner"] for each in shell.ask("pins")["pins"]] == ["ann", "bob"]
    assert "ann" in shell.run("pins")
    assert "unpinned 1" in shell.run("unpin", pin["id"])
    assert "unpinned 1" in shell.run("unpin", "--owner", "bob")
    assert "unpinned 0" in shell.run("unpin", "--owner", "bob", status=1)
    absent = SPACE.key(b"\1" * 32, 0)
    held = SPACE.key(STORED.pieces[0].chunk_hash, 0)
    assert "1 are not in L1" in shell.run("pin", "--owner", "x", "--key", held, "--key", absent, status=1)
    shell.run("unpin", "--owner", "x")


def test_clear_and_warm(shell: Shell, tokens: str) -> None:
    assert shell.run("clear", "--tier", "l1", "--yes") == "dropped: l1 3\n"
    assert shell.ask("tiers")["tiers"][0]["entries"] == 0
    assert shell.ask("warm", "--tokens", tokens)["result"]["loaded"] == 3
    assert "3 were in L1" in shell.run("warm", "--tokens", tokens, "--model", "org/model")
    assert shell.ask("clear", "--prefix", SPACE.key_prefix, "--yes")["result"] == {"l1": 3, "disk": 3}
    key = SPACE.key(STORED.pieces[0].chunk_hash, 0)
    shell.run("warm", "--key", key, "--namespace", "no such", status=1)
    assert "1 held nowhere" in shell.run("warm", "--key", key, status=1)
    job = shell.ask("clear", "--yes", "--no-wait")
    assert job["kind"] == "clear"
    assert job["id"] in shell.run("jobs")
    assert shell.ask("jobs")["jobs"][0]["id"] == job["id"]


def test_an_empty_scope_does_not_clear_everything(shell: Shell) -> None:
    for option in ("--model", "--prefix"):
        shell.run("clear", option, "", "--yes", status=1)
    assert shell.run("clear", "--salt", "", "--tier", "disk", "--yes").startswith("dropped")
    assert shell.ask("tiers")["tiers"][0]["entries"] == 3


def test_a_salt_from_standard_input(served: Served, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    salted = prompt(CHUNK_SIZE, 1, SPACE, salt="of acme")
    store(served.client, salted)
    served.client.stats()
    for expected in (1, 0):
        monkeypatch.setattr("sys.stdin", io.StringIO("of acme\n"))
        assert shell.ask("clear", "--salt", "-", "--tier", "l1", "--yes")["result"] == {"l1": expected}
    assert shell.ask("tiers")["tiers"][0]["entries"] == 3  # those without a salt


def test_clear_asks(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: bool(asked.append(question)))
    shell.run("clear", "--model", "org/model", status=1)
    assert "Drop model_name 'org/model' from all tiers of http://127.0.0.1" in asked[0]
    assert shell.ask("tiers")["tiers"][0]["entries"] == 3


def test_verify(served: Served, shell: Shell) -> None:
    assert "disk: 3 checked, 0 bad" in shell.run("verify")
    with served.server.cache.guarded() as index:
        entry = index.get(STORED.pieces[0].chunk_hash, 0)
    served.server.cache.pool[entry.offset + 999] ^= 1
    text = shell.run("verify", "--tier", "l1", status=1)
    assert "l1: 3 checked, 1 bad" in text
    assert SPACE.key(STORED.pieces[0].chunk_hash, 0) in text
    assert shell.ask("verify", "--tier", "disk", "--sample", "2")["result"]["disk"]["checked"] == 2


def test_ping(served: Served, shell: Shell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kv").mkdir()
    for target in (served.api.url, served.server.endpoint, f"file://{tmp_path}/kv"):
        assert main(["ping", target, "--count", "2", "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["up"]
        assert len(answer["seconds"]) == 2
    for target in ("http://127.0.0.1:1", "redis://:geheim@127.0.0.1:1"):
        assert main(["ping", target]) == 1
        captured = capsys.readouterr()
        assert "does not answer" in captured.out
        assert "geheim" not in captured.out + captured.err
    for target in ("localhost", "127.0.0.1:8080"):
        assert main(["ping", target]) == 2
        assert f"write http://{target}" in capsys.readouterr().err


def test_ping_makes_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", f"disk://{tmp_path}/nowhere"]) == 2
    assert "there is no directory" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["status", "--url", "http://127.0.0.1:1"],
            1,
            "no kvstrata server answers at http://127.0.0.1:1: ",
        ),
        (["tiers", "--url", "ftp://x"], 2, "expected http://HOST:PORT"),
        (["tiers", "--url", "http://ann:geheim@h"], 2, "expected http://HOST:PORT"),
        (["tiers", "--token-file", "/nowhere", "--url", "http://127.0.0.1:1"], 2, "/nowhere"),
        (["clear"], 2, "nobody to ask: add --yes"),
        (["pin"], 2, "--owner"),
        (["pin", "--owner", "x"], 2, "say what to pin"),
        (["unpin"], 2, "give either ID or --owner"),
        (["warm"], 2, "give either --key or --tokens"),
        (["warm", "--tokens", "/nowhere"], 2, "--tokens /nowhere: No such file"),
        (["verify", "--sample", "0"], 2, "--sample"),
        (["status", "--watch", "0"], 2, "--watch"),
        (["runtime", "--l1-budget-gb", "-1"], 2, "--l1-budget-gb"),
    ],
)
def test_what_is_wrong_is_one_clear_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("kvstrata: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_what_the_server_refuses_is_one_clear_line(
    served: Served, shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--url", served.api.url]) == 1
    assert "wants the token" in capsys.readouterr().err
    shell.run("pin", "--owner", "x", "--prefix", "nothing@", status=1)
    assert main(["clear", "--yes", "--tier", "no", *shell._options]) == 1
    assert capsys.readouterr().err.endswith("there is no tier 'no'; there is l1, disk\n")


def test_another_kind_of_server_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  its name there
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        assert main(["tiers", "--url", f"http://127.0.0.1:{other.server_port}"]) == 1
        thread.join()
    assert "not as a kvstrata server does" in capsys.readouterr().err


def test_explain(served: Served, shell: Shell) -> None:
    asked = Prompt([*STORED.tokens, *range(2 * CHUNK_SIZE)], SPACE)
    assert look(served.client, "cmpl-17-0#1", asked) == len(STORED)
    text = shell.run("explain", "cmpl-17")
    assert f"{len(STORED)} of {len(asked)} tokens hit" in text
    assert f"0 - {len(STORED) - 1}" in text
    assert "absent" in text
    found = shell.ask("explain", "cmpl-17-0#1")
    assert [each["state"] for each in found["ranges"]] == ["hit", "miss"]
    assert "cmpl-17-0#1" in shell.run("explain")
    assert shell.ask("explain")[0]["request_id"] == "cmpl-17-0#1"
    assert main(["explain", "nobody", *shell._options]) == 1
