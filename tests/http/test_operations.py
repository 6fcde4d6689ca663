"""The operations through the HTTP API of a real server, with a disk tier."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest

from kvstrata.client import RemoteClient
from kvstrata.operations import jobs as jobs_module
from kvstrata.operations.tiers import quantile
from kvstrata.testing.api import Api, Served, serving
from kvstrata.testing.client import (
    CHUNK_BYTES,
    CHUNK_SIZE,
    POOL_CHUNKS,
    Prompt,
    look,
    make_namespace,
    prompt,
    small_settings,
    store,
)
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.waiting import wait_until

SPACE = make_namespace("org/model")
OTHER = make_namespace("org/other", world_size=2)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(small_settings(local_disk=str(tmp_path / "kv"), runtime_dir=str(tmp_path))) as served:
        yield served


@pytest.fixture
def api(served: Served) -> Api:
    return served.api


@pytest.fixture
def client(served: Served) -> RemoteClient:
    return served.client


def put(served: Served, stored: Prompt) -> None:
    """Store a prompt, and wait until the disk has it."""
    store(served.client, stored)
    served.client.stats()  # an answer comes after the commit before it, which has none
    assert served.server.cache.flush(20)


def keys(api: Api, query: str = "") -> list[str]:
    return [entry["key"] for entry in api.get(f"/entries?limit=1000{query}")["entries"]]


def test_every_tier_is_shown_with_its_figures(served: Served, api: Api) -> None:
    stored = prompt(3 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    look(served.client, "r", stored)
    l1, disk = api.get("/tiers")
    assert (l1["name"], l1["state"], l1["entries"], l1["hit_tokens"]) == ("l1", "up", 3, len(stored))
    assert l1["used_bytes"] >= 3 * CHUNK_BYTES
    assert l1["budget_bytes"] > l1["used_bytes"]
    assert (disk["name"], disk["kind"], disk["state"], disk["entries"]) == ("disk", "disk", "up", 3)
    writes = next(figures for figures in disk["operations"] if figures["operation"] == "write")
    assert writes["count"] == 3
    assert writes["bytes"] >= 3 * CHUNK_BYTES
    assert 0 < writes["p50_seconds"] <= writes["p99_seconds"]
    assert next(f for f in disk["operations"] if f["operation"] == "read")["p50_seconds"] is None


def test_quantiles_are_interpolated_as_prometheus_does() -> None:
    buckets = [(0.1, 10.0), (0.2, 30.0), (1.0, 40.0), (float("inf"), 41.0)]
    assert quantile(buckets, 0.5) == pytest.approx(0.1 + 0.1 * 10.5 / 20)
    assert quantile(buckets, 0.1) == pytest.approx(0.041)
    assert quantile(buckets, 0.99) is None
    assert quantile([(0.1, 0.0), (float("inf"), 0.0)], 0.5) is None


def test_a_lookup_says_which_tier_holds_how_much_and_has_no_effect(served: Served, api: Api) -> None:
    stored = prompt(4 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    body = {"tokens": [*stored.tokens, 1, 2, 3], "model_name": "org/model"}
    before = api.get("/stats")["totals"]
    (answer,) = api.post("/lookup", body)
    assert (answer["num_tokens"], answer["num_held_tokens"]) == (len(stored) + 3, len(stored))
    assert [(t["tier"], t["answered"], t["leading_tokens"], t["used_tokens"]) for t in answer["tiers"]] == [
        ("l1", True, len(stored), len(stored)),
        ("disk", True, len(stored), 0),
    ]
    third = SPACE.key(stored.pieces[2].chunk_hash, 0)
    assert api.ask("POST", "/entries/delete", {"keys": [third], "tiers": ["l1"]}).json["l1_entries"] == 1
    (answer,) = api.post("/lookup", body)
    assert [t["used_tokens"] for t in answer["tiers"]] == [2 * CHUNK_SIZE, 2 * CHUNK_SIZE]
    assert api.post("/lookup", body | {"salt": "tenant"})[0]["num_held_tokens"] == 0
    after = api.get("/stats")["totals"]
    assert (after["lookups"], after["hit_tokens"]) == (before["lookups"], before["hit_tokens"])
    assert len(keys(api)) == 3
    assert api.ask("POST", "/lookup", body | {"model_name": "no"}).status == 404


def test_namespaces_are_what_engines_registered(served: Served, api: Api) -> None:
    put(served, prompt(CHUNK_SIZE, 1, OTHER))
    (found,) = api.get("/namespaces")
    assert found["model_name"] == "org/other"
    assert found["fingerprint"] == OTHER.fingerprint.hex()
    assert (found["world_size"], found["chunk_size"]) == (2, CHUNK_SIZE)


@pytest.mark.parametrize("tier", ["l1", "disk"])
def test_entries_come_in_pages_that_miss_nothing(served: Served, api: Api, tier: str) -> None:
    stored = prompt(7 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    put(served, prompt(2 * CHUNK_SIZE, 2, OTHER))
    seen: list[str] = []
    after = ""
    while True:
        page = api.get(f"/entries?tier={tier}&limit=3&model_name=org/model&after={quote(after)}")
        assert len(page["entries"]) <= 3
        seen += [entry["key"] for entry in page["entries"]]
        after = page["next_after"]
        if after is None:
            break
    assert len(seen) == 7
    assert set(seen) == {SPACE.key(piece.chunk_hash, 0) for piece in stored.pieces}
    assert len(keys(api, f"&tier={tier}")) == 7 + 4
    assert len(keys(api, f"&tier={tier}&prefix={quote(OTHER.key_prefix)}1")) == 2


def test_entries_of_a_salt(served: Served, api: Api) -> None:
    put(served, prompt(2 * CHUNK_SIZE, 1, SPACE, salt="a"))
    put(served, prompt(3 * CHUNK_SIZE, 1, SPACE, salt="b"))
    assert len(keys(api, "&salt=a")) == 2
    assert len(keys(api, "&salt=b")) == 3
    assert keys(api, "&salt=c") == []
    assert api.ask("GET", "/entries?tier=disk&salt=a").status == 422


def test_one_entry_in_all_tiers(served: Served, api: Api) -> None:
    stored = prompt(2 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    key = SPACE.key(stored.pieces[1].chunk_hash, 0)
    found = api.get(f"/entries/{key}")
    assert found["l1"]["first_token"] == CHUNK_SIZE
    assert found["l1"]["also_in"] == ["disk"]
    (frame,) = found["frames"]
    assert (frame["tier"], frame["intact"], frame["num_tokens"]) == ("disk", True, CHUNK_SIZE)
    assert api.ask("GET", f"/entries/{key[:-1]}0").status in {200, 404}
    assert api.ask("GET", "/entries/nonsense").status == 422


def test_delete_one_by_prefix_by_model_and_by_salt(served: Served, api: Api) -> None:
    stored = prompt(3 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    put(served, prompt(2 * CHUNK_SIZE, 2, OTHER))
    put(served, prompt(2 * CHUNK_SIZE, 2, SPACE, salt="tenant"))
    key = SPACE.key(stored.pieces[2].chunk_hash, 0)
    assert api.ask("DELETE", f"/entries/{key}").json == {
        "l1_entries": 1,
        "queued_in": ["disk"],
        "not_asked": [],
    }
    wait_until(lambda: key not in keys(api, "&tier=disk"), "the disk deletes it")
    job = api.wait_job(api.post("/entries/delete", {"model_name": "org/other"}))
    assert (job["state"], job["result"]) == ("done", {"l1": 4, "disk": 4})
    job = api.wait_job(api.post("/entries/delete", {"salt": "tenant"}))
    assert (job["state"], job["result"]["l1"]) == ("done", 2)
    wait_until(lambda: len(keys(api, "&tier=disk")) == 2, "the disk deletes them")
    job = api.wait_job(api.post("/entries/delete", {"prefix": SPACE.key_prefix, "tiers": ["disk"]}))
    assert (job["state"], job["result"]) == ("done", {"disk": 2})
    assert look(served.client, "r", stored) == 2 * CHUNK_SIZE
    assert api.ask("POST", "/entries/delete", {}).status == 422
    assert api.ask("POST", "/entries/delete", {"prefix": "x", "tiers": ["no"]}).status == 404


def test_a_deletion_by_salt_waits_for_a_tier_that_is_away(served: Served, api: Api) -> None:
    put(served, prompt(2 * CHUNK_SIZE, 1, SPACE, salt="tenant"))
    api.ask("PATCH", "/runtime", {"bypass": {"disk": True}})
    job = api.post("/entries/delete", {"salt": "tenant"})
    wait_until(lambda: keys(api) == [], "it has left L1")
    assert api.get(f"/jobs/{job['id']}")["state"] == "running", "the disk has not deleted anything"
    api.ask("PATCH", "/runtime", {"bypass": {"disk": False}})
    assert api.wait_job(job)["result"] == {"l1": 2, "disk": 2}
    assert keys(api, "&tier=disk") == []


@pytest.mark.parametrize("tiers", [["l1"], ["disk"], None])
def test_clear(served: Served, api: Api, tiers: list[str] | None) -> None:
    stored = prompt(3 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    job = api.wait_job(api.post("/clear", {"tiers": tiers}))
    assert job["state"] == "done"
    assert job["result"] == dict.fromkeys(tiers or ["l1", "disk"], 3)
    assert job["num_done"] == 3 * len(tiers or ["l1", "disk"])
    held = {tier: len(keys(api, f"&tier={tier}")) for tier in ("l1", "disk")}
    assert held == {tier: 0 if tiers is None or tier in tiers else 3 for tier in ("l1", "disk")}
    if tiers == ["disk"]:  # what the disk lost is written again when it is stored again
        put(served, stored)
        assert len(keys(api, "&tier=disk")) == 3


def fill_l1(client: RemoteClient) -> None:
    """Store more than L1 can hold."""
    for seed in range(100, 100 + 2 * POOL_CHUNKS // 8):
        store(client, prompt(8 * CHUNK_SIZE, seed, SPACE))


def test_what_is_pinned_stays_until_it_is_unpinned(served: Served, api: Api, client: RemoteClient) -> None:
    kept, lost = prompt(3 * CHUNK_SIZE, 1, SPACE), prompt(3 * CHUNK_SIZE, 2, SPACE)
    put(served, kept)
    put(served, lost)
    pin = api.post("/pins", {"owner": "ann", "tokens": kept.tokens, "model_name": "org/model"})
    assert (pin["num_entries"], pin["num_not_held"]) == (3, 0)
    assert 3000 < pin["seconds_left"] <= 3600
    fill_l1(client)
    (found,) = api.get("/pins")
    assert (found["id"], found["payload_bytes"]) == (pin["id"], 3 * CHUNK_BYTES)
    held = keys(api)
    assert all(SPACE.key(piece.chunk_hash, 0) in held for piece in kept.pieces)
    assert not any(SPACE.key(piece.chunk_hash, 0) in held for piece in lost.pieces)
    assert api.ask("DELETE", f"/pins/{pin['id']}").status == 200
    assert api.ask("DELETE", f"/pins/{pin['id']}").status == 404
    fill_l1(client)
    assert not any(SPACE.key(piece.chunk_hash, 0) in keys(api) for piece in kept.pieces)


def test_pins_end_in_time_and_with_their_owner_and_free_what_was_deleted(served: Served, api: Api) -> None:
    stored = prompt(2 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    key = SPACE.key(stored.pieces[0].chunk_hash, 0)
    api.post("/pins", {"owner": "ann", "keys": [key], "seconds": 0.01})
    wait_until(lambda: api.get("/pins") == [], "the pin is over")
    for prefix in (SPACE.key_prefix, key):
        api.post("/pins", {"owner": "bob", "prefix": prefix})
    api.wait_job(api.post("/clear", {}))
    wait_until(lambda: api.get("/stats")["l1"]["used_bytes"] == 0, "slots of cleared entries are free")
    assert len(api.ask("DELETE", "/pins?owner=bob").json) == 2
    assert api.get("/pins") == []
    assert api.get("/stats")["l1"]["used_bytes"] == 0


def test_pins_are_bounded(served: Served, api: Api) -> None:
    for seed in range(3):
        put(served, prompt(16 * CHUNK_SIZE, seed, SPACE))
    answer = api.ask("POST", "/pins", {"owner": "ann", "prefix": "vllm@"})
    assert answer.status == 409
    assert "half of L1's budget" in answer.json["detail"]
    assert api.get("/pins") == []
    assert api.ask("POST", "/pins", {"owner": "ann", "prefix": "nothing@"}).status == 404
    assert api.ask("POST", "/pins", {"owner": "ann"}).status == 422


@pytest.mark.parametrize("by", ["prompts", "keys"])
@pytest.mark.parametrize("space", [SPACE, OTHER], ids=["one", "two shards"])
def test_warming_brings_entries_to_l1(served: Served, api: Api, by: str, space: object) -> None:
    stored = prompt(3 * CHUNK_SIZE + 20, 1, space)  # type: ignore[arg-type]
    put(served, stored)
    all_keys = keys(api)
    api.wait_job(api.post("/clear", {"tiers": ["l1"]}))
    assert keys(api) == []
    wanted = {"prompts": [stored.tokens]} if by == "prompts" else {"keys": all_keys}
    job = api.wait_job(api.post("/warm", wanted))
    assert job["state"] == "done"
    assert job["result"]["loaded"] == len(all_keys)
    assert (job["result"]["failed"], job["result"]["not_held"], job["result"]["no_room"]) == (0, 0, 0)
    assert sorted(keys(api)) == sorted(all_keys)
    assert api.get("/stats")["totals"]["lookups"] == 0
    assert look(served.client, "r", stored) == len(stored)
    assert api.get("/stats")["totals"]["hit_tokens"]["disk"] == 0
    again = api.wait_job(api.post("/warm", wanted))
    assert (again["result"]["loaded"], again["result"]["already_in_l1"]) == (0, len(all_keys))


def test_warming_by_key_takes_the_namespace_that_is_meant(served: Served, api: Api) -> None:
    """Keys of both look alike; an entry under the wrong one would be in the way of the right one's."""
    other = msgspec.structs.replace(SPACE, model_fingerprint="trained further")
    look(served.client, "other", prompt(CHUNK_SIZE, 1, other))
    stored = prompt(2 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    wanted = {"keys": keys(api)}
    api.wait_job(api.post("/clear", {"tiers": ["l1"]}))
    job = api.wait_job(api.post("/warm", wanted))
    assert job["state"] == "failed"
    assert "2 namespaces have keys like" in job["error"]
    job = api.wait_job(api.post("/warm", wanted | {"namespace": SPACE.fingerprint.hex()[:12]}))
    assert (job["state"], job["result"]["loaded"]) == ("done", 2)
    look(served.client, "r", stored)
    assert api.get("/stats")["totals"]["hit_tokens"]["l1"] == len(stored)


def test_warming_needs_something_that_is_known(served: Served, api: Api) -> None:
    assert api.ask("POST", "/warm", {"prompts": [[1, 2]]}).status == 404
    put(served, prompt(CHUNK_SIZE, 1, SPACE))
    assert api.ask("POST", "/warm", {}).status == 422
    job = api.wait_job(api.post("/warm", {"prompts": [[1] * (3 * CHUNK_SIZE + 5)]}))
    assert (job["state"], job["result"]["not_held"]) == ("done", 3)
    api.ask("PATCH", "/runtime", {"bypass": {"disk": True}})
    job = api.wait_job(api.post("/warm", {"prompts": [[1] * (3 * CHUNK_SIZE + 5)]}))
    assert (job["result"]["not_held"], job["result"]["failed"]) == (0, 3)
    api.ask("PATCH", "/runtime", {"bypass": {"disk": False}})
    absent = SPACE.key(b"\1" * 32, 0)
    job = api.wait_job(api.post("/warm", {"keys": [absent]}))
    assert (job["state"], job["result"]["not_held"]) == ("done", 1)


def test_verify_finds_what_is_damaged(served: Served, api: Api, tmp_path: Path) -> None:
    stored = prompt(6 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    job = api.wait_job(api.post("/verify", {}))
    assert job["state"] == "done"
    for tier in ("l1", "disk"):
        assert (job["result"][tier]["checked"], job["result"][tier]["bad"]) == (6, 0)
    damaged = SPACE.key(stored.pieces[3].chunk_hash, 0)
    (file,) = [p for p in (tmp_path / "kv").rglob("*") if stored.pieces[3].chunk_hash.hex() in p.name]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    job = api.wait_job(api.post("/verify", {"tiers": ["disk"], "delete_bad": True}))
    figures = job["result"]["disk"]
    assert (figures["checked"], figures["bad"]) == (6, 1)
    assert figures["bad_keys"] == [{"key": damaged, "fault": "the payload's checksum is wrong"}]
    wait_until(lambda: len(keys(api, "&tier=disk")) == 5, "the bad one is deleted")
    job = api.wait_job(api.post("/verify", {"tiers": ["disk"], "sample": 2}))
    assert (job["result"]["disk"]["checked"], job["num_total"]) == (2, 2)


def test_verify_finds_damage_in_l1(served: Served, api: Api) -> None:
    stored = prompt(2 * CHUNK_SIZE, 1, SPACE)
    put(served, stored)
    with served.server.cache.guarded() as index:
        entry = index.get(stored.pieces[0].chunk_hash, 0)
    served.server.cache.pool[entry.offset + 500] ^= 1
    job = api.wait_job(api.post("/verify", {"tiers": ["l1"]}))
    assert job["result"]["l1"]["bad"] == 1


def test_the_budget_of_l1_shrinks_and_grows(served: Served, api: Api) -> None:
    for seed in range(4):
        put(served, prompt(8 * CHUNK_SIZE, seed, SPACE))
    before = api.get("/runtime")
    budget = 10 * (CHUNK_BYTES + 4096)
    after = api.ask("PATCH", "/runtime", {"l1_budget_bytes": budget}).json
    assert after["l1_used_bytes"] <= after["l1_budget_bytes"] == budget
    assert 0 < len(keys(api)) <= 10
    put(served, prompt(8 * CHUNK_SIZE, 99, SPACE))
    assert api.get("/stats")["l1"]["used_bytes"] <= budget
    capacity = before["l1_capacity_bytes"]
    assert api.ask("PATCH", "/runtime", {"l1_budget_bytes": capacity}).json["l1_budget_bytes"] == capacity
    assert api.ask("PATCH", "/runtime", {"l1_budget_bytes": capacity + 1}).status == 409


def test_frozen_stores_nothing_and_serves_on(served: Served, api: Api) -> None:
    held, new = prompt(2 * CHUNK_SIZE, 1, SPACE), prompt(2 * CHUNK_SIZE, 2, SPACE)
    put(served, held)
    assert api.ask("PATCH", "/runtime", {"stores_frozen": True}).json["stores_frozen"]
    assert store(served.client, new) == 0
    assert look(served.client, "a", held) == len(held)
    assert look(served.client, "b", new) == 0
    api.ask("PATCH", "/runtime", {"stores_frozen": False})
    assert store(served.client, new) == len(new)


def test_the_gate_changes(served: Served, api: Api) -> None:
    first = prompt(2 * CHUNK_SIZE, 1, SPACE)
    put(served, first)
    assert api.get("/runtime")["gate"] == "auto"
    assert api.ask("PATCH", "/runtime", {"gate": "never"}).json["gate"] == "never"
    api.wait_job(api.post("/clear", {"tiers": ["l1"]}))
    assert look(served.client, "a", first) == 0
    assert api.ask("PATCH", "/runtime", {"gate": "sometimes"}).status == 422
    api.ask("PATCH", "/runtime", {"gate": "always"})
    assert look(served.client, "b", first) == len(first)


def test_a_bypassed_tier_is_neither_read_nor_written(served: Served, api: Api) -> None:
    first, second = prompt(2 * CHUNK_SIZE, 1, SPACE), prompt(2 * CHUNK_SIZE, 2, SPACE)
    put(served, first)
    api.wait_job(api.post("/clear", {"tiers": ["l1"]}))
    assert api.ask("PATCH", "/runtime", {"bypass": {"disk": True}}).json["bypassed_tiers"] == ["disk"]
    assert api.get("/health")["tiers"] == {"disk": "bypassed"}
    assert look(served.client, "a", first) == 0
    store(served.client, second)
    assert api.ask("GET", "/entries?tier=disk").status == 503
    api.ask("PATCH", "/runtime", {"bypass": {"disk": False}})
    assert look(served.client, "b", first) == len(first)
    assert len(keys(api, "&tier=disk")) == 2
    assert api.ask("PATCH", "/runtime", {"bypass": {"l1": True}}).status == 422
    assert api.ask("PATCH", "/runtime", {"bypass": {"no": True}, "stores_frozen": True}).status == 404
    assert api.get("/runtime")["stores_frozen"] is False


def test_the_life_of_entries_changes(tmp_path: Path) -> None:
    with RedisServer() as redis:
        settings = small_settings(
            local_disk=str(tmp_path / "kv"), remote_url=redis.url, ttl_seconds=1000, runtime_dir=str(tmp_path)
        )
        with serving(settings) as served:
            first, second, third = (prompt(CHUNK_SIZE, seed, SPACE) for seed in (1, 2, 3))
            put(served, first)
            assert served.api.get("/runtime")["ttl_seconds"] == {"redis": 1000}
            wanted = {"ttl_seconds": {"redis": 50}}
            assert served.api.ask("PATCH", "/runtime", wanted).json["ttl_seconds"] == {"redis": 50}
            put(served, second)
            assert served.api.ask("PATCH", "/runtime", {"ttl_seconds": {"redis": None}}).status == 200
            put(served, third)
            left = [
                redis.ask("TTL", SPACE.key(stored.pieces[0].chunk_hash, 0) + "kv_bytes")
                for stored in (first, second, third)
            ]
            assert 900 < left[0] <= 1000
            assert 0 < left[1] <= 50
            assert left[2] == -1
            for name, status in (("disk", 422), ("l1", 422), ("no", 404)):
                refused = {"ttl_seconds": {"redis": 7, name: 5}}
                assert served.api.ask("PATCH", "/runtime", refused).status == status
            assert served.api.ask("PATCH", "/runtime", {"ttl_seconds": {"redis": 0}}).status == 422
            assert served.api.get("/runtime")["ttl_seconds"] == {"redis": None}


def test_the_log_level_changes(api: Api) -> None:
    logger = logging.getLogger("kvstrata")
    before = logger.level
    try:
        assert api.ask("PATCH", "/runtime", {"log_level": "ERROR"}).json["log_level"] == "ERROR"
        assert logger.level == logging.ERROR
        assert api.ask("PATCH", "/runtime", {"log_level": "LOUD"}).status == 422
    finally:
        logger.setLevel(before)


def test_jobs_can_be_cancelled_and_are_bounded(
    served: Served, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "MAX_WAITING", 3)
    put(served, prompt(CHUNK_SIZE, 1, SPACE))
    api.ask("PATCH", "/runtime", {"bypass": {"disk": True}})
    running = api.post("/entries/delete", {"prefix": "vllm@"})
    wait_until(lambda: api.get(f"/jobs/{running['id']}")["state"] == "running", "it waits for the disk")
    waiting = [api.post("/clear", {"tiers": ["l1"]}) for _ in range(3)]
    assert api.ask("POST", "/clear", {}).status == 429
    assert api.ask("DELETE", f"/jobs/{waiting[1]['id']}").status == 202
    assert api.ask("DELETE", f"/jobs/{running['id']}").status == 202
    assert api.wait_job(running)["state"] == "cancelled"
    assert [api.wait_job(job)["state"] for job in waiting] == ["done", "cancelled", "done"]
    assert api.ask("DELETE", f"/jobs/{running['id']}").status == 409
    assert api.ask("DELETE", "/jobs/none").status == 404
    assert [job["id"] for job in api.get("/jobs")] == [job["id"] for job in [*reversed(waiting), running]]


def test_the_prefixes_that_are_hit_most(served: Served, api: Api) -> None:
    assert api.get("/prefixes") == []
    shared = prompt(2 * CHUNK_SIZE, 1, SPACE)
    longer = Prompt([*shared.tokens, *range(CHUNK_SIZE)], SPACE)
    put(served, longer)
    for number, asked in enumerate((shared, longer, longer, longer)):
        look(served.client, f"r{number}", asked)
    most, longest = api.get("/prefixes")
    assert most["last_hit_at"] >= longest["last_hit_at"]
    described = [(p["num_tokens"], p["num_hits"], p["held_in"], p["model_name"]) for p in (most, longest)]
    assert described == [
        (len(longer), 3, ["l1", "disk"], "org/model"),
        (len(shared), 4, ["l1", "disk"], "org/model"),
    ]
    assert most["key"] == SPACE.key(longer.chunks[-1].chunk_hash, 0)
    assert api.ask("DELETE", "/entries/" + quote(most["key"], safe="")).status == 200
    assert [p["held_in"] for p in api.get("/prefixes")] == [[], ["l1", "disk"]]
    assert api.get("/prefixes?limit=1") == [api.get("/prefixes")[0]]


def test_the_configuration_is_shown_without_secrets(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-some-length\n")
    token.chmod(0o600)
    settings = small_settings(
        remote_url="redis://ann:geheim@127.0.0.1:1/0",
        http_token_file=str(token),
        log_level="ERROR",
        runtime_dir=str(tmp_path),
    )
    with serving(settings) as served, contextlib.ExitStack():
        config = served.api.ask("GET", "/config")
        assert config.json["settings"]["remote_url"] == "redis://ann:***@127.0.0.1:1/0"
        for path in ("/config", "/tiers", "/stats", "/health", "/metrics", "/openapi.json"):
            answer = served.api.ask("GET", path)
            assert answer.status == 200
            assert b"geheim" not in answer.body
            assert b"a-token-of-some" not in answer.body


def test_the_log_says_what_an_operator_changed(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kvstrata"):
        api.ask("PATCH", "/runtime", {})
        api.ask("PATCH", "/runtime", {"gate": "never", "bypass": {"disk": True}})
    said = [message for message in caplog.messages if "by an operator" in message]
    assert said == ["changed by an operator: gate=never, bypass={'disk': True}"]
