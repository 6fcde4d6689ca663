"""From settings to tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstrata.config import load_settings, tier_configs, tier_from_url, unbounded
from kvstrata.errors import ConfigError
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.open import open_tier
from kvstrata.tiers.redis import RedisTier


def configs(**settings: Any) -> list[Any]:
    return tier_configs(load_settings({}, overrides=settings).settings)


def test_disk_then_remote_then_the_list() -> None:
    disk, remote, far, nfs = configs(
        local_disk="file:///x",
        max_local_disk_size=2,
        remote_url="redis://h:1",
        ttl_seconds=60,
        blocking_timeout_secs=1.5,
        num_workers=2,
        tiers=[
            {"url": "redis://far:1", "name": "far", "num_workers": 8, "key_prefix": "p:"},
            {"kind": "disk", "path": "/nfs", "max_bytes": 1000, "write_policy": "none"},
        ],
    )
    general = {"timeout_seconds": 1.5, "num_workers": 2}
    assert (disk.kind, disk.name, disk.codec, disk.write_policy) == ("disk", "disk", "naive", "all")
    assert disk.options == general | {"path": "/x", "max_bytes": 2 << 30, "name": "disk"}
    assert (remote.kind, remote.name, remote.codec) == ("redis", "redis", "naive")
    assert remote.options == general | {"url": "redis://h:1", "ttl_seconds": 60, "name": "redis"}
    assert far.name == "far"
    assert far.options == general | {
        "url": "redis://far:1",
        "name": "far",
        "num_workers": 8,
        "key_prefix": "p:",
    }
    assert (nfs.name, nfs.write_policy) == ("disk-2", "none")


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_schemes_of_one_kind(scheme: str) -> None:
    (config,) = configs(remote_url=f"{scheme}://h:1")
    assert (config.kind, config.options["url"]) == ("redis", f"{scheme}://h:1")


@pytest.mark.parametrize("kind", ["disk", "file"])
def test_the_url_of_a_directory(kind: str) -> None:
    (config,) = configs(tiers=[{"url": f"{kind}:///x%20y", "max_bytes": 5}])
    assert (config.kind, config.options["path"], config.options["max_bytes"]) == (kind, "/x y", 5)
    (config,) = configs(remote_url=f"{kind}:///x?max_bytes=7")
    assert (config.kind, config.options["path"], config.options["max_bytes"]) == (kind, "/x", 7)
    with pytest.raises(ConfigError, match="must have `max_bytes`"):
        configs(remote_url=f"{kind}:///x")
    with pytest.raises(ConfigError, match=rf"tiers\[0\] .* expected a path or a {kind}:// URL"):
        configs(tiers=[{"url": f"{kind}://"}])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({}, "it needs 'kind' or 'url'"),
        ({"kind": "dsik"}, "no tier 'dsik' in this version (did you mean 'disk'?); there is disk, "),
        ({"url": "s4://x"}, "this version has tiers for"),
        ({"kind": "disk", "path": "/x"}, "must have `max_bytes`"),
        ({"kind": "disk", "path": "/x", "max_byte": 5}, "no option 'max_byte' (did you mean 'max_bytes'?)"),
        ({"kind": "disk", "path": "/x", "max_bytes": "5"}, "Expected `int`, got `str` - at `$.max_bytes`"),
        ({"kind": "disk", "path": "/x", "max_bytes": 5, "codec": "zip"}, "no codec 'zip'"),
        (
            {"kind": "disk", "path": "/x", "max_bytes": 5, "write_policy": "some"},
            "expected all, second_use, none",
        ),
        ({"kind": "disk", "path": "/x", "max_bytes": 5, "name": "a b"}, "$.name"),
        ({"kind": "redis", "url": "redis://h", "num_workers": 0}, "$.num_workers"),
        ({"kind": "redis", "url": "redis://h", "timeout_seconds": -1}, "$.timeout_seconds"),
        ({"kind": "redis", "url": "redis://h", "ttl_second": 1}, "did you mean 'ttl_seconds'?"),
        ({"kind": "redis", "url": "redis://:geheim@h", "db": 1}, "no option 'db'"),
        ({"kind": "redis", "url": "redis://:geheim@h", "ttl_seconds": "x"}, "redis://:***@h"),
    ],
)
def test_a_wrong_item(item: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs(tiers=[{"url": "redis://h:1"}, item])
    assert str(caught.value).startswith("tiers[1]")
    assert message in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_names_are_unique() -> None:
    names = [config.name for config in configs(tiers=[{"url": "redis://a"}, {"url": "redis://b"}])]
    assert names == ["redis", "redis-2"]
    with pytest.raises(ConfigError, match="two tiers are named 'x'"):
        configs(tiers=[{"url": "redis://a", "name": "x"}, {"url": "redis://b", "name": "x"}])
    with pytest.raises(ConfigError, match="two tiers are named 'l1'"):
        configs(tiers=[{"url": "redis://a", "name": "l1"}])


def test_repr_masks_secrets() -> None:
    assert "geheim" not in repr(configs(remote_url="redis://:geheim@h:1"))


def test_open_tier(tmp_path: Path) -> None:
    disk, remote = configs(local_disk=str(tmp_path / "kv"), remote_url="redis://127.0.0.1:1")
    for config, kind in ((disk, DiskTier), (remote, RedisTier)):
        tier = open_tier(config)
        assert type(tier) is kind
        tier.close()


def test_a_tier_by_url_has_no_budget_that_evicts(tmp_path: Path) -> None:
    config = tier_from_url(f"disk://{tmp_path}?max_bytes=5")
    assert config.options["max_bytes"] == 2**62
    (configured,) = configs(local_disk=str(tmp_path))
    assert unbounded(configured).options == configured.options | {"max_bytes": 2**62}
    with pytest.raises(
        ConfigError, match=r"URL 'nope://:\*\*\*@h' is not allowed: this version has tiers for"
    ):
        tier_from_url("nope://:geheim@h")
