"""The benchmarks themselves, small, on real servers. Nothing is asserted on how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.bench import codec, faults, lookup, tier
from kvstrata.bench.kv import RealKV, real_kv
from kvstrata.cli import main
from kvstrata.config import tier_from_url
from kvstrata.errors import ConfigError
from kvstrata.testing.codec import make_payload
from kvstrata.testing.redis_cluster import RedisCluster
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.tiers.open import open_tier
from kvstrata.types import KVLayout

SMALL_FRAMES = {"frame_bytes": 65_536, "num_frames": 3, "contains_keys": 10, "runs": 2}


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(["maxmemory 256mb", "maxmemory-policy allkeys-lru"]) as server:
        yield server


def test_lookup_measures_both_transports() -> None:
    config = lookup.LookupConfig(chunks=1000, prompt_tokens=2048, lookups=10, runs=1)
    report = lookup.run(config)
    assert [row[:2] for row in report.rows] == [("ipc", 1000), ("tcp", 1000)]
    assert list(report.ratios) == [
        "p50_ms",
        "p99_ms",
        "bytes_per_chunk",
        "hit_with_metrics_over_without",
        "miss_with_metrics_over_without",
    ]
    assert report.notes[0].startswith("metrics and explanations add ")
    assert 0 < report.ratios["p50_ms"] <= report.ratios["p99_ms"]


def test_lookup_measures_at_powers_of_ten_on_the_way() -> None:
    config = lookup.LookupConfig(chunks=12_000, prompt_tokens=512, lookups=5, runs=1, transports=("ipc",))
    report = lookup.run(config)
    assert [row[1] for row in report.rows] == [10_000, 12_000]
    # An entry is an object, a key and a place in several dicts.
    assert 200 < report.ratios["bytes_per_chunk"] < 2000


def test_lookup_refuses_an_index_smaller_than_its_prompts() -> None:
    with pytest.raises(ConfigError, match="10 chunks"):
        lookup.run(lookup.LookupConfig(chunks=10))


def test_copy_measures_both_ways() -> None:
    pytest.importorskip("torch", reason="torch is not installed: make setup")
    from kvstrata.bench import copy  # noqa: PLC0415

    config = copy.CopyConfig(num_layers=2, num_blocks=4, engine_blocks=8, runs=2)
    report = copy.run(config)
    assert list(report.ratios) == ["store_over_memcpy", "retrieve_over_memcpy"]
    assert config.page_bytes == 98_304
    assert all(len(values) == 2 and min(values) > 0 for values in report.samples.values())


def test_tier_on_redis_leaves_nothing_there(redis_server: RedisServer) -> None:
    report = tier.run(tier.TierBenchConfig(url=redis_server.url, **SMALL_FRAMES))
    assert list(report.ratios) == ["read_over_raw", "write_over_raw"]
    assert len(report.samples["read"]) == len(report.samples["raw_read"]) == 2
    opened = open_tier(tier_from_url(redis_server.url))
    try:
        assert list(opened.scan()) == []
    finally:
        opened.close()


def test_tier_on_a_cluster_is_compared_with_the_nodes_that_have_the_names() -> None:
    with RedisCluster(password="pw") as cluster:
        report = tier.run(tier.TierBenchConfig(url=cluster.url, **SMALL_FRAMES))
        assert list(report.ratios) == ["read_over_raw", "write_over_raw"]
        assert [node.ask("DBSIZE") for node in cluster.nodes] == [0, 0, 0]


def test_tier_on_a_remote_server_leaves_nothing_there() -> None:
    with RemoteServerThread(token=b"geheim") as server:
        report = tier.run(tier.TierBenchConfig(url=server.url, **SMALL_FRAMES))
        assert list(report.ratios) == ["read_over_raw", "write_over_raw"]
        assert "geheim" not in json.dumps(report.config)
        assert len(server.service.store) == 0


@pytest.mark.parametrize("scheme", ["disk", "file"])
def test_tier_on_disk_leaves_the_directory_as_it_was(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "mine").write_text("untouched")
    report = tier.run(tier.TierBenchConfig(url=f"{scheme}://{tmp_path}", **SMALL_FRAMES))
    assert set(report.ratios) == {"read_over_raw", "write_over_raw"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tier_hides_a_password_and_wants_a_directory(tmp_path: Path) -> None:
    with RedisServer(password="geheim") as server:
        report = tier.run(tier.TierBenchConfig(url=server.url, **SMALL_FRAMES))
    assert "geheim" not in json.dumps(report.config)
    with pytest.raises(ConfigError, match="no directory"):
        tier.run(tier.TierBenchConfig(url=f"disk://{tmp_path}/absent"))


def test_faults_measures_a_far_l2_and_one_that_does_not_answer() -> None:
    report = faults.run(faults.FaultsConfig(chunks=4, lookup_timeout_ms=100, runs=2))
    assert list(report.ratios) == [
        "lookup_ms",
        "lookup_and_load_ms",
        "stalled_over_deadline",
        "open_over_none",
    ]
    assert report.ratios["lookup_and_load_ms"] >= 10
    assert min(report.samples["absent"]) >= 5
    assert min(report.samples["stalled"]) >= 100


def test_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "tier.json"
    arguments = ["bench", "tier", f"disk://{tmp_path}", "--frame-bytes", "8192", "--runs", "2"]
    assert main([*arguments, "--json", str(into)]) == 0
    table = capsys.readouterr().out
    assert "read_over_raw" in table
    report = json.loads(into.read_bytes())
    assert set(report["ratios"]) == {"read_over_raw", "write_over_raw"}
    assert report["environment"]["cores"] >= 1
    assert main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "tier"


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tier", "gopher://x"]) == 2
    assert "gopher" in capsys.readouterr().err
    assert main(["bench", "lookup", "--transport", "pigeon"]) == 2
    assert "pigeon" in capsys.readouterr().err
    for option in ("--json", "--svg"):
        assert main(["bench", "quality", option, str(tmp_path / "none" / "x")]) == 2
        assert "there is no folder" in capsys.readouterr().err
    assert main(["bench", "codec", "--codec", "zstd:99", "--cache-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "expected an integer from 1 to 19" in said
    assert "computing" not in said


def test_codec_weighs_times_and_checks_them() -> None:
    layout = KVLayout(128, (32_768,) * 2, "bfloat16", "test")
    payloads = tuple(make_payload(2 * 65_536, "normal", seed=seed) for seed in range(2))
    kv = RealKV(layout, payloads)
    report = codec.run(codec.CodecBenchConfig(codecs=("naive", "floats", "floats+aesgcm"), runs=2), kv=kv)
    assert [(row[0], row[2]) for row in report.rows] == [
        ("naive", "yes"), ("floats", "yes"), ("floats+aesgcm", "yes"),
    ]  # fmt: skip
    assert report.ratios["naive_size"] == 1
    assert report.ratios["lossless_size"] == report.ratios["floats_size"] > 1.3
    assert len(report.samples["floats decode 2"]) == 2
    naive, floats = report.rows[:2]
    assert naive[-1] is None
    assert floats[-1] is not None
    with pytest.raises(ConfigError, match="no codec 'flots'"):
        codec.run(codec.CodecBenchConfig(codecs=("flots",)), kv=kv)


@pytest.mark.slow
def test_codec_on_the_kv_of_the_small_model() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: make setup")
    kv = real_kv(Path(".cache"), 2)
    assert [len(payload) for payload in kv.payloads] == [2 * kv.layout.block_bytes] * 2
    assert kv.layout.block_bytes == 30 * 98_304
    report = codec.run(codec.CodecBenchConfig(codecs=("floats",), runs=1), kv=kv)
    assert report.ratios["lossless_size"] >= 1.4
