"""``kvstrata keys`` on a real Redis server and on a directory."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.cli import main
from kvstrata.config import tier_from_url
from kvstrata.frame import HEADER_BYTES, FrameHeader, payload_checksum
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import make_keys
from kvstrata.tiers.base import Tier
from kvstrata.tiers.open import open_tier

KEYS = sorted([*make_keys(5, "org/one"), *make_keys(3, "org/two")])
ONE = [key for key in KEYS if "@org/one@" in key]


def make_frame(size: int) -> bytearray:
    payload = random.Random(size).randbytes(size)
    header = FrameHeader(
        shard=0,
        first_token=256,
        num_tokens=size // 10,
        block_size=16,
        payload_bytes=size,
        encoded_bytes=size,
        layout_fingerprint=b"L" * 16,
        chunk_hash=b"C" * 32,
        tokens_hash=b"T" * 32,
        payload_checksum=payload_checksum(payload),
        created_at=1_700_000_000,
        codec="naive",
        dtype="bfloat16",
    )
    frame = bytearray(HEADER_BYTES) + payload
    header.pack_into(memoryview(frame))
    return frame


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(password="geheim") as server:
        yield server


@pytest.fixture(params=["redis", "disk", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer) -> str:
    return redis_server.url if request.param == "redis" else f"{request.param}://{tmp_path}"


@pytest.fixture
def tier(url: str) -> Iterator[Tier]:
    """A tier that holds a small frame under each of KEYS, and nothing else."""
    with contextlib.closing(open_tier(tier_from_url(url))) as tier:
        tier.delete(list(tier.scan()))
        tier.write(KEYS, [memoryview(make_frame(1000 + index)) for index in range(len(KEYS))])
        yield tier


def test_list(tier: Tier, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list", "--tier", url]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert sorted(key for _, key in lines) == KEYS
    assert {name for name, _ in lines} == {tier.kind}
    assert main(["keys", "list", "--tier", url, "--prefix", "vllm@org/one@", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tiers": [{"tier": tier.kind, "keys": ONE}]}
    assert main(["keys", "list", "--tier", url, "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def test_count(tier: Tier, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "count", "--tier", url]) == 0
    assert capsys.readouterr().out.split() == ["tier", "keys", tier.kind, "8"]
    assert main(["keys", "count", "--tier", url, "--prefix", "vllm@org/two@", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tiers": [{"tier": tier.kind, "keys": 3}], "total": 3}


def test_show(tier: Tier, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "show", KEYS[2], "--tier", url, "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    expected = {"tier": tier.kind, "held": True, "intact": True, "frame_bytes": 1002 + HEADER_BYTES}
    expected |= {"num_tokens": 100, "first_token": 256, "codec": "naive", "dtype": "bfloat16"}
    expected |= {"created_at": 1_700_000_000, "chunk_hash": (b"C" * 32).hex()}
    assert expected.items() <= entry.items()
    assert main(["keys", "show", KEYS[2], "--tier", url]) == 0
    assert "num_tokens" in capsys.readouterr().out


def test_show_says_when_a_frame_is_damaged(tier: Tier, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = make_frame(5000)
    damaged[-1] ^= 1
    tier.write(KEYS[:3], [memoryview(damaged), memoryview(b"foreign" * 50), memoryview(make_frame(900)[:-1])])
    for key in KEYS[:3]:
        assert main(["keys", "show", key, "--tier", url, "--json"]) == 0
        (entry,) = json.loads(capsys.readouterr().out)["entries"]
        assert (entry["held"], entry["intact"]) == (True, False)


def test_show_of_a_key_that_is_not_held(tier: Tier, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    absent = make_keys(1, "org/three")[0]
    assert main(["keys", "show", absent, "--tier", url, "--json"]) == 1
    (entry,) = json.loads(capsys.readouterr().out)["entries"]
    assert (entry["held"], entry["reason"]) == (False, "absent")


def test_delete_by_prefix(tier: Tier, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "delete", "vllm@org/one@", "--tier", url, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tiers": [{"tier": tier.kind, "deleted": 5}], "total": 5}
    assert sorted(tier.scan()) == [key for key in KEYS if key not in ONE]
    assert main(["keys", "delete", "", "--tier", url, "-y"]) == 0
    assert list(tier.scan()) == []


@pytest.mark.parametrize("answer", [True, False])
def test_delete_asks(
    answer: bool,
    tier: Tier,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question: asked.append(question) or answer)
    assert main(["keys", "delete", "vllm@org/one@", "--tier", url]) == 0
    assert len(asked) == 1
    assert "Delete 5 keys that begin with 'vllm@org/one@' from " in asked[0]
    assert "geheim" not in asked[0] + capsys.readouterr().out
    assert len(list(tier.scan())) == (3 if answer else 8)


def test_all_configured_tiers_and_one_by_name(
    tmp_path: Path,
    redis_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "kv").mkdir()
    monkeypatch.setenv("KVSTRATA_LOCAL_DISK", str(tmp_path / "kv"))
    monkeypatch.setenv("KVSTRATA_REMOTE_URL", redis_server.url)
    # A budget that would evict everything: looking must not.
    monkeypatch.setenv("KVSTRATA_MAX_LOCAL_DISK_SIZE", "0.0000001")
    with contextlib.closing(open_tier(tier_from_url(f"disk://{tmp_path}/kv"))) as disk:
        disk.write(KEYS[:1], [memoryview(make_frame(1000))])
    with contextlib.closing(open_tier(tier_from_url(redis_server.url))) as remote:
        remote.delete(list(remote.scan()))
    assert main(["keys", "count", "--json"]) == 0
    counts = {tier["tier"]: tier["keys"] for tier in json.loads(capsys.readouterr().out)["tiers"]}
    assert counts == {"disk": 1, "redis": 0}
    assert main(["keys", "show", KEYS[0], "--json"]) == 0
    held = {entry["tier"]: entry["held"] for entry in json.loads(capsys.readouterr().out)["entries"]}
    assert held == {"disk": True, "redis": False}
    assert main(["keys", "count", "--tier", "disk", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 1


def test_a_server_that_does_not_answer_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "count", "--tier", "redis://:geheim@127.0.0.1:1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("kvstrata: ")
    assert captured.err.count("\n") == 1
    assert "geheim" not in captured.err
