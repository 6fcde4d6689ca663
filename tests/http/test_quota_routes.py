"""Quotas through the HTTP API and the command line, on a real server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.cli import main
from kvstrata.testing.api import Served, serving
from kvstrata.testing.client import CHUNK_SIZE, look, make_namespace, prompt, small_settings, store

SPACE = make_namespace("org/model")
SECRET = "a-salt-that-nobody-is-told"
SLOT = 4096 * 5


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    quotas = ({"name": "acme", "salt": SECRET, "tiers": {"l1": {"limit_bytes": 2 * SLOT}}},)
    with serving(small_settings(runtime_dir=str(tmp_path), quotas=quotas)) as served:
        yield served


def put(served: Served, count: int, salt: str, seed: int = 1) -> None:
    for number in range(count):
        store(served.client, prompt(CHUNK_SIZE, 100 * seed + number, SPACE, salt))
    served.client.stats()


def test_quotas_are_configured_listed_and_kept(served: Served) -> None:
    put(served, 5, SECRET)
    put(served, 5, "other")
    (found,) = served.api.get("/quotas")
    (row,) = found["tiers"]
    assert found["name"] == "acme"
    assert (row["tier"], row["reserved_bytes"], row["limit_bytes"]) == ("l1", 0, 2 * SLOT)
    assert (row["used_bytes"], row["entries"], row["evictions"], row["refusals"]) == (2 * SLOT, 2, 3, 0)
    assert served.api.get("/quotas/acme") == found
    gone = prompt(CHUNK_SIZE, 100, SPACE, SECRET)
    assert look(served.client, "r", gone) == 0
    explained = served.api.get("/explain/r")
    assert explained["reason"] == "salt_quota"
    text = served.api.ask("GET", "/metrics").body.decode()
    assert f'kvstrata_quota_used_bytes{{quota="acme",tier="l1"}} {2 * SLOT}.0' in text
    assert 'kvstrata_evictions_total{reason="quota"} 3.0' in text
    assert 'kvstrata_misses_total{reason="salt_quota"} 1.0' in text


def test_quotas_are_changed_while_the_server_runs(served: Served) -> None:
    put(served, 4, "busy")
    body = {"tiers": {"l1": {"limit_bytes": SLOT}}}
    answer = served.api.ask("PUT", "/quotas/busy", body)
    assert (answer.status, answer.json["tiers"][0]["used_bytes"]) == (200, SLOT)
    changed = served.api.ask("PUT", "/quotas/acme", {"tiers": {"l1": {"reserved_bytes": 3 * SLOT}}}).json
    assert changed["tiers"][0]["limit_bytes"] is None
    put(served, 3, SECRET)
    assert served.api.get("/quotas/acme")["tiers"][0]["entries"] == 3, "it has kept its salt"
    budget = served.api.get("/runtime")["l1_budget_bytes"]
    too_much = {"tiers": {"l1": {"reserved_bytes": budget}}}
    refused = served.api.ask("PUT", "/quotas/busy", too_much)
    assert (refused.status, "would be reserved" in refused.json["detail"]) == (409, True)
    assert served.api.ask("PATCH", "/runtime", {"l1_budget_bytes": 2 * SLOT}).status == 409
    assert served.api.ask("DELETE", "/quotas/busy").json["name"] == "busy"
    assert [each["name"] for each in served.api.get("/quotas")] == ["acme"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/quotas/a b", {"tiers": {"l1": {}}}, 422),
        ("/quotas/a", {"tiers": {}}, 422),
        ("/quotas/a", {"tiers": {"disk": {}}}, 422),
        ("/quotas/a", {"tiers": {"l1": {"limit_bytes": -1}}}, 422),
        ("/quotas/a", {"tiers": {"l1": {"limit": 1}}}, 422),
        ("/quotas/default", {"tiers": {"l1": {"reserved_bytes": 1}}}, 422),
        ("/quotas/a", {"salt": SECRET, "tiers": {"l1": {}}}, 422),
    ],
)
def test_what_is_wrong_is_refused(served: Served, path: str, body: dict[str, Any], status: int) -> None:
    answer = served.api.ask("PUT", path.replace(" ", "%20"), body)
    assert answer.status == status, answer
    assert SECRET not in answer.body.decode()
    assert served.api.ask("GET", "/quotas/nobody").status == 404
    assert served.api.ask("DELETE", "/quotas/nobody").status == 404


def test_salts_are_told_nowhere(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        put(served, 5, SECRET)
        served.api.ask("PUT", "/quotas/acme", {"salt": SECRET, "tiers": {"l1": {"limit_bytes": SLOT}}})
        shown = [served.api.ask("GET", path).body.decode() for path in ("/config", "/quotas", "/metrics")]
    assert SECRET not in caplog.text + "".join(shown)
    assert "quota acme set by an operator" in caplog.text


def test_with_isolation_entries_are_listed_to_who_names_their_salt(tmp_path: Path) -> None:
    changes = {"runtime_dir": str(tmp_path), "local_disk": str(tmp_path / "kv"), "isolation": "salt"}
    with serving(small_settings(**changes)) as served:
        put(served, 3, SECRET)
        put(served, 2, "")
        counts = [
            len(served.api.get(f"/entries{query}")["entries"]) for query in ("", f"?salt={SECRET}", "?salt=x")
        ]
        assert counts == [2, 3, 0]
        refused = served.api.ask("GET", "/entries?tier=disk")
        assert (refused.status, "isolation" in refused.json["detail"]) == (422, True)
        key = served.api.get(f"/entries?salt={SECRET}")["entries"][0]["key"]
        assert served.api.get(f"/entries/{key}")["l1"]["key"] == key, "who knows a key may ask for it"


class Shell:
    """Runs commands against the server."""

    def __init__(self, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
        self._url, self._capsys = served.api.url, capsys

    def run(self, *arguments: str, status: int = 0) -> str:
        assert main(["quota", *arguments, "--url", self._url]) == status
        return self._capsys.readouterr().out

    def ask(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))


def test_the_command_lists_sets_and_removes(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(served, capsys)
    put(served, 3, SECRET)
    assert "acme   l1    40.0 KiB" in shell.run("list")
    assert [each["name"] for each in shell.ask("list")["quotas"]] == ["acme"]
    file = tmp_path / "salt"
    file.write_text("x\n")
    megabyte = 1 / 1024
    set_now = shell.ask("set", "small", "--limit-gb", str(megabyte), "--salt-file", str(file))
    assert set_now["tiers"][0]["limit_bytes"] == 1 << 20
    more = shell.ask("set", "small", "--reserved-gb", str(megabyte / 2))
    assert (more["tiers"][0]["reserved_bytes"], more["tiers"][0]["limit_bytes"]) == (1 << 19, 1 << 20)
    assert shell.ask("set", "small", "--no-limit")["tiers"][0]["limit_bytes"] is None
    put(served, 1, "x")
    assert shell.ask("get", "small")["tiers"][0]["entries"] == 1
    assert shell.run("remove", "small") == "removed small\n"
    shell.run("get", "small", status=1)
    shell.run("set", "small", status=2)
    shell.run("set", "small", "--no-limit", "--limit-gb", "1", status=2)
