from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from kvstrata.cache.build import build_cache
from kvstrata.config import load_settings
from kvstrata.errors import ConfigError
from kvstrata.memory.region import SharedRegion
from kvstrata.metrics import Metrics
from kvstrata.tiers.redis import RedisTier


def test_a_network_tier_has_a_connection_for_each_thread_that_uses_it(tmp_path: Path) -> None:
    settings = load_settings({}, overrides={"num_workers": 1, "remote_url": "redis://127.0.0.1:1"}).settings
    with contextlib.closing(SharedRegion.create(1 << 20, str(tmp_path))) as region:
        cache = build_cache(settings, region, Metrics())
        try:
            (tier,) = cache.tiers
            assert isinstance(tier.tier, RedisTier)
            assert tier.tier.options.num_workers == 3, "look-ups, reads, writes"
        finally:
            cache.close(1.0)


def test_required_encryption_wants_a_codec_that_encrypts(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ab" * 32 + "\n")
    (tmp_path / "keys").chmod(0o600)
    given = {
        "require_encryption": True,
        "encryption_key_file": str(tmp_path / "keys"),
        "remote_url": "redis://127.0.0.1:1",
        "remote_serde": "floats",
    }
    with contextlib.closing(SharedRegion.create(1 << 20, str(tmp_path))) as region:
        with pytest.raises(ConfigError, match=r"tier redis .* 'floats': set one that ends with aesgcm"):
            build_cache(load_settings({}, overrides=given).settings, region, Metrics())
        given["remote_serde"] = "floats+aesgcm"
        build_cache(load_settings({}, overrides=given).settings, region, Metrics()).close(1.0)
