"""Settings that users of LMCache have today, unchanged."""

from __future__ import annotations

from pathlib import Path

from kvstrata.config import load_settings, tier_configs

ENVIRONMENT = {
    "LMCACHE_USE_EXPERIMENTAL": "True",
    "LMCACHE_CHUNK_SIZE": "256",
    "LMCACHE_LOCAL_CPU": "False",
    "LMCACHE_REMOTE_URL": "redis://lmcache-redis.prod.svc.cluster.local:6379",
    "LMCACHE_REMOTE_SERDE": "naive",
}
FILE = """\
chunk_size: 256
remote_url: "redis://127.0.0.1:6379"
remote_serde: "naive"
local_cpu: true
max_local_cpu_size: 5.0
"""
THREE_TIERS = """\
local_cpu: true
max_local_cpu_size: 10.0
local_storage: "/nvme/x"
max_local_storage_size: 100.0
remote_url: "redis://127.0.0.1:6379"
remote_serde: "naive"
"""


def test_environment() -> None:
    resolved = load_settings(ENVIRONMENT)
    assert resolved.notices == ()
    assert (resolved.settings.chunk_size, resolved.settings.local_cpu) == (256, False)
    (tier,) = tier_configs(resolved.settings)
    assert (tier.kind, tier.codec) == ("redis", "naive")
    assert tier.options["url"] == "redis://lmcache-redis.prod.svc.cluster.local:6379"


def test_cachegen_by_its_name_there() -> None:
    resolved = load_settings({**ENVIRONMENT, "LMCACHE_REMOTE_SERDE": "cachegen"})
    (tier,) = tier_configs(resolved.settings)
    assert tier.codec == "cachegen"


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FILE)
    resolved = load_settings({"LMCACHE_CONFIG_FILE": str(path)})
    assert resolved.notices == ()
    assert (resolved.settings.local_cpu, resolved.settings.max_local_cpu_size) == (True, 5.0)
    assert [tier.options["url"] for tier in tier_configs(resolved.settings)] == ["redis://127.0.0.1:6379"]


def test_file_and_variables_together(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(FILE)
    settings = load_settings(ENVIRONMENT | {"LMCACHE_CONFIG_FILE": str(path)}).settings
    assert settings.local_cpu is True
    assert settings.remote_url == "redis://127.0.0.1:6379"


def test_three_tiers(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(THREE_TIERS)
    resolved = load_settings({"LMCACHE_CONFIG_FILE": str(path)})
    assert resolved.notices == ()
    disk, redis = tier_configs(resolved.settings)
    assert (disk.kind, disk.options["path"], disk.options["max_bytes"]) == ("disk", "/nvme/x", 100 << 30)
    assert redis.kind == "redis"


def test_small_chunks() -> None:
    assert load_settings({"LMCACHE_CHUNK_SIZE": "8"}).settings.chunk_size == 8
