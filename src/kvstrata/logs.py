"""Logging: one logger, ``kvstrata``, with one handler of its own. The root logger is left alone.

[2026-05-16 08:46:00,417] kvstrata INFO: message (file.py:543)
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from kvstrata.errors import ConfigError

LOGGER_NAME = "kvstrata"

_FORMAT = "[%(asctime)s] kvstrata %(levelname)s: %(message)s (%(filename)s:%(lineno)d)"
_VARIABLES = ("KVSTRATA_LOG_LEVEL", "LMCACHE_LOG_LEVEL")
_LEVELS = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.CRITICAL,
}
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[1;31m",
}
_PLAIN = "\x1b[0m"


class _Colouring(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        colour = _COLOURS.get(record.levelno)
        text = super().format(record)
        return f"{colour}{text}{_PLAIN}" if colour else text


class _LogStream(logging.StreamHandler[TextIO]):
    """A type of its own, so that a second call finds the handler of the first."""


def configure_logging(level: str | None = None, stream: TextIO | None = None) -> None:
    """Set up the logger ``kvstrata``. May be called again; the last call decides. Thread-safe.

    Args:
        level: a level's name, in any case. None: what ``KVSTRATA_LOG_LEVEL`` or ``LMCACHE_LOG_LEVEL`` says,
            else INFO.
        stream: where to write, standard error when None. Colour is used on a terminal only, and not when
            ``NO_COLOR`` is set.

    Raises:
        ConfigError: there is no such level.
    """
    source = "argument"
    if level is None:
        source = next((name for name in _VARIABLES if os.environ.get(name, "").strip()), "default")
        level = os.environ.get(source, "INFO").strip()
    if level.upper() not in _LEVELS:
        allowed = ", ".join(name for name in _LEVELS if name != "WARN")
        raise ConfigError(f"log_level = {level!r} (from {source}) is not allowed: expected {allowed}")
    stream = sys.stderr if stream is None else stream
    handler = _LogStream(stream)
    coloured = stream.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter((_Colouring if coloured else logging.Formatter)(_FORMAT))
    logger = logging.getLogger(LOGGER_NAME)
    logger.handlers = [*(old for old in logger.handlers if not isinstance(old, _LogStream)), handler]
    logger.setLevel(_LEVELS[level.upper()])
    logger.propagate = False
