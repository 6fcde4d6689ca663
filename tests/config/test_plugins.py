from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from kvstrata import plugins
from kvstrata.errors import PluginError
from kvstrata.tiers.disk import DiskTier


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation with one good tier and three bad ones."""

    class Distribution:
        name = "kvstrata"

    points = [
        EntryPoint("disk", "kvstrata.tiers.disk:DiskTier", "kvstrata.tiers"),
        EntryPoint("s9", "no_such_module_of_s9:S9Tier [s9]", "kvstrata.tiers"),
        EntryPoint("gone", "kvstrata.tiers.disk:NoSuchTier", "kvstrata.tiers"),
    ]
    with_dist = [point._for(Distribution()) for point in points]
    monkeypatch.setattr(plugins, "entry_points", lambda group: with_dist if group == "kvstrata.tiers" else [])
    plugins._found.cache_clear()
    plugins.load.cache_clear()
    yield
    plugins._found.cache_clear()
    plugins.load.cache_clear()


def test_what_is_installed() -> None:
    assert {"disk", "redis"} <= set(plugins.names("tiers"))
    assert "naive" in plugins.names("codecs")
    assert {"lru", "s3fifo"} <= set(plugins.names("policies"))
    assert plugins.load("tiers", "disk") is DiskTier


@pytest.mark.parametrize(("group", "noun"), [("tiers", "tier"), ("codecs", "codec"), ("policies", "policy")])
def test_every_plugin_of_this_package_loads_and_an_unknown_one_lists_them(
    group: plugins.Group, noun: str
) -> None:
    listed = plugins.names(group)
    for name in listed:
        assert isinstance(plugins.load(group, name), type)
    with pytest.raises(
        PluginError, match=f"no {noun} 'nope' in this installation; there is: {', '.join(listed)}"
    ):
        plugins.load(group, "nope")


def test_a_plugin_that_cannot_be_imported_says_which_extra(installed: None) -> None:
    with pytest.raises(PluginError, match=r"tier 's9' cannot be loaded.*pip install 'kvstrata\[s9\]'"):
        plugins.load("tiers", "s9")
    with pytest.raises(PluginError, match=r"tier 'gone' cannot be loaded.*NoSuchTier"):
        plugins.load("tiers", "gone")
    assert plugins.load("tiers", "disk") is DiskTier


def test_nothing_installed_says_so(installed: None) -> None:
    with pytest.raises(PluginError, match="is kvstrata installed"):
        plugins.load("codecs", "naive")


def test_naming_plugins_imports_none() -> None:
    code = (
        "import sys; from kvstrata.config import load_settings; load_settings({}); "
        "heavy = ('kvstrata.tiers', 'kvstrata.policies', 'redis', 'torch'); "
        "print([m for m in sys.modules if m.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
