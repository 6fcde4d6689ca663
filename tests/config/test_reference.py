from __future__ import annotations

from pathlib import Path

from kvstrata.config import ALIASES, SETTINGS
from kvstrata.config.reference import reference_text

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_settings_tree_says() -> None:
    assert PAGE.read_text() == reference_text(), "run: kvstrata config docs > docs/configuration.md"


def test_every_key_is_on_it() -> None:
    text = reference_text()
    for name in (*SETTINGS, *ALIASES):
        assert f"`{name}`" in text


def test_every_setting_says_what_it_means() -> None:
    for setting in SETTINGS.values():
        assert setting.meta.description
        assert setting.meta.description.endswith(".")
