"""Sizes as Redis and Valkey write them, which are not those of Kubernetes."""

from __future__ import annotations

import re

from kvstrata.errors import ConfigError

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 2**10,
    "m": 10**6, "mb": 2**20,
    "g": 10**9, "gb": 2**30,
}  # fmt: skip
_KUBERNETES = {"ki": "kb", "mi": "mb", "gi": "gb"}
_MEMORY_SETTINGS = frozenset({"maxmemory"})


def parse_memory(text: str) -> int:
    """The bytes that a memory value of Redis means: ``80g`` is 80,000,000,000, ``80gb`` is 85,899,345,920.

    Raises:
        ConfigError: Redis would refuse it; the message says how to write it.
    """
    match = re.fullmatch(r"(\d+)([a-z]*)", text.strip().lower())
    unit = match[2] if match else ""
    if match is not None and unit in _UNITS:
        return int(match[1]) * _UNITS[unit]
    hint = f"; {text} of Kubernetes is {match[1]}{_KUBERNETES[unit]}" if match and unit in _KUBERNETES else ""
    raise ConfigError(
        f"{text!r} is no memory value of Redis: a whole number with b, k, kb, m, mb, g or gb"
        f" (80g is 80,000,000,000 bytes, 80gb is 85,899,345,920){hint}"
    )


def check_redis_config(lines: list[str]) -> None:
    """Check the memory values in lines of a redis.conf.

    Raises:
        ConfigError: Redis would not start with one of them.
    """
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) >= 2 and words[0].lower() in _MEMORY_SETTINGS:
            try:
                parse_memory(words[1].strip("\"'"))
            except ConfigError as error:
                raise ConfigError(f"line {number}, {words[0]}: {error}") from None
