"""The setting ``quotas``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvstrata.config import QuotaConfig, Settings, load_settings, mask, quota_configs
from kvstrata.errors import ConfigError
from kvstrata.quotas import Quota

SECRET = "a-salt-that-nobody-is-told"


def load(monkeypatch: pytest.MonkeyPatch, value: str) -> Settings:
    monkeypatch.setenv("KVSTRATA_QUOTAS", value)
    return load_settings().settings


def test_quotas_come_from_a_file_or_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kvstrata.yaml"
    file.write_text(
        f"local_disk: {tmp_path}/kv\n"
        "quotas:\n"
        f"  - {{name: acme, salt: {SECRET}, tiers: {{l1: {{reserved_bytes: 1}}, disk: {{limit_bytes: 3}}}}}}\n"
        "  - {name: default, tiers: {l1: {limit_bytes: 4}}}\n"
    )
    settings = load_settings(file=file).settings
    acme, default = quota_configs(settings)
    assert acme == QuotaConfig(
        name="acme", salt=SECRET, tiers={"l1": Quota(reserved_bytes=1), "disk": Quota(limit_bytes=3)}
    )
    assert (acme.cache_salt, default.name) == (SECRET, "default")
    assert SECRET not in repr(acme) + repr(settings) + json.dumps(mask(settings.quotas, "quotas"))
    (named,) = quota_configs(load(monkeypatch, '[{"name": "acme", "tiers": {"l1": {}}}]'))
    assert named.cache_salt == "acme"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"name": "a b", "tiers": {"l1": {}}}], "quotas[0] is not allowed"),
        ([{"name": "a"}], "quotas[0] is not allowed"),
        ([{"name": "a", "tiers": {"l1": {"limit": 1}}}], "quotas[0] is not allowed"),
        ([{"name": "a", "tiers": {"l1": {"limit_bytes": -1}}}], "quotas[0] is not allowed"),
        ([{"name": "a", "tiers": {"disk": {}}}], "there is no tier 'disk'"),
        ([{"name": "a", "tiers": {}}, {"name": "a", "tiers": {}}], "quotas[1] is not allowed: there are two"),
        (
            [{"name": "a", "salt": SECRET, "tiers": {}}, {"name": "b", "salt": SECRET, "tiers": {}}],
            "same salt",
        ),
        ({"name": "a", "salt": SECRET}, "is not allowed"),
    ],
)
def test_what_is_wrong_names_its_place_and_no_salt(
    monkeypatch: pytest.MonkeyPatch, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(monkeypatch, json.dumps(value))
    assert message in str(raised.value)
    assert SECRET not in str(raised.value)


def test_broken_text_does_not_show_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="quotas") as raised:
        load(monkeypatch, f'[{{"name": "a", "salt": "{SECRET}"')
    assert SECRET not in str(raised.value)
