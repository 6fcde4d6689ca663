"""The guide for those who come from LMCache says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from kvstrata.cli.main import app
from kvstrata.config import SETTINGS
from kvstrata.config.lmcache import FATES, LMCACHE_COMMANDS, LMCACHE_KEYS, LMCACHE_OPTIONS
from kvstrata.config.migration import migration_text

PAGE = Path(__file__).parents[2] / "docs" / "migrate-from-lmcache.md"


def options(words: list[str]) -> set[str]:
    """The options of one of our commands."""
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return {name for parameter in command.params for name in parameter.opts}


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text() == migration_text(), (
        "run: kvstrata config migration > docs/migrate-from-lmcache.md"
    )


def test_everything_is_on_it_once() -> None:
    for name in (*LMCACHE_KEYS, *LMCACHE_OPTIONS, *LMCACHE_COMMANDS):
        assert PAGE.read_text().count(f"\n| `{name}` | ") == 1, name


def test_defaults_that_differ_are_ours() -> None:
    noted = {key: re.search(r"the default is (\w+) here", entry.note) for key, entry in LMCACHE_KEYS.items()}
    for key, found in noted.items():
        if found is not None:
            default = SETTINGS[key].default
            assert found[1] == (str(default).lower() if isinstance(default, bool) else f"{default:g}")


def test_options_of_the_server() -> None:
    ours = options(["server"])
    for name, option in LMCACHE_OPTIONS.items():
        match option.fate:
            case "same":
                assert name in ours
            case "mapped":
                assert option.note in SETTINGS
            case _:
                assert option.note
                assert name not in ours, f"{name} is an option of ours: say so in the table"


@pytest.mark.parametrize("name", [name for name, key in LMCACHE_COMMANDS.items() if key.fate == "mapped"])
def test_commands_become_commands_of_ours(name: str) -> None:
    _, *words = LMCACHE_COMMANDS[name].note.split()
    given = [word for word in words if word.startswith("--")]
    assert set(given) <= options([word for word in words if not word.startswith("--") and word != "l1"])


def test_all_have_a_fate() -> None:
    for key in (*LMCACHE_KEYS.values(), *LMCACHE_OPTIONS.values(), *LMCACHE_COMMANDS.values()):
        assert key.fate in FATES
        assert key.note or key.fate == "same"
