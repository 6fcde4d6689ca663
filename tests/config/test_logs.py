from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from kvstrata.errors import ConfigError
from kvstrata.logs import configure_logging

LINE = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\] kvstrata INFO: Stored 5 tokens \(test_logs\.py:\d+\)\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logger_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("KVSTRATA_LOG_LEVEL", "LMCACHE_LOG_LEVEL", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("kvstrata")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_form_and_names_below() -> None:
    stream = io.StringIO()
    configure_logging("info", stream)
    logging.getLogger("kvstrata.cache.cache").info("Stored %d tokens", 5)
    logging.getLogger("kvstrata.cache.cache").debug("not shown")
    assert re.fullmatch(LINE, stream.getvalue())


def test_calling_it_again_changes_and_does_not_double() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("INFO", first)
    configure_logging("DEBUG", second)
    logging.getLogger("kvstrata").debug("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_the_root_logger_is_left_alone() -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    configure_logging("DEBUG", io.StringIO())
    assert (list(root.handlers), root.level) == before


@pytest.mark.parametrize(
    ("environ", "level"),
    [
        ({}, logging.INFO),
        ({"LMCACHE_LOG_LEVEL": "debug"}, logging.DEBUG),
        ({"KVSTRATA_LOG_LEVEL": "ERROR", "LMCACHE_LOG_LEVEL": "DEBUG"}, logging.ERROR),
        ({"KVSTRATA_LOG_LEVEL": "", "LMCACHE_LOG_LEVEL": "WARN"}, logging.WARNING),
    ],
)
def test_the_environment_decides_when_no_level_is_given(
    environ: dict[str, str], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    configure_logging(stream=io.StringIO())
    assert logging.getLogger("kvstrata").level == level


def test_a_wrong_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_LOG_LEVEL", "LOUD")
    with pytest.raises(ConfigError, match=r"log_level = 'LOUD' \(from LMCACHE_LOG_LEVEL\)"):
        configure_logging(stream=io.StringIO())


def test_colour_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(stream: io.StringIO) -> str:
        configure_logging("INFO", stream)
        logging.getLogger("kvstrata").warning("look")
        return stream.getvalue()

    assert "\x1b[33m" in warned(Terminal())
    assert "\x1b" not in warned(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in warned(Terminal())
