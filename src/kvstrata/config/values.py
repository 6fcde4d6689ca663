"""From what a person wrote to a value of the right type, or an error that says what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kvstrata import plugins
from kvstrata.config.codecs import parse_codec
from kvstrata.config.nearest import nearest
from kvstrata.config.secrets import MASK, mask
from kvstrata.config.settings import Setting
from kvstrata.errors import ConfigError

_BOOLEANS = {
    "true": True, "1": True, "yes": True, "on": True,
    "false": False, "0": False, "no": False, "off": False,
}  # fmt: skip
_NONE = frozenset({"", "none", "null"})
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def parse(setting: Setting, value: Any, source: str) -> Any:
    """The value of ``setting`` that ``value`` stands for: of the right type already, or as text.

    Raises:
        ConfigError: it stands for none; the message names key, value, source and what is allowed.
    """
    try:
        parsed = _convert(setting, value)
        check = _CHECKS.get(setting.key)
        return parsed if check is None or parsed is None else check(parsed)
    except (ValueError, msgspec.MsgspecError) as error:
        allowed = str(error) if isinstance(error, _NotAllowedError) else f"expected {setting.allowed}"
        shown = MASK if setting.key == "quotas" and isinstance(value, str) else mask(value, setting.key)
        raise ConfigError(f"{setting.key} = {shown!r} (from {source}) is not allowed: {allowed}") from None


class _NotAllowedError(ValueError):
    """Carries what is allowed instead, for the message."""


def _convert(setting: Setting, value: Any) -> Any:
    as_text = isinstance(value, str)
    if as_text:
        value = value.strip()
        if setting.optional and value.lower() in _NONE:
            return None
        if setting.base is tuple:
            value = msgspec.json.decode(value)
    if setting.base is bool:
        return _boolean(value)
    if setting.key == "gate" and str(value).lower() in _BOOLEANS:  # as it was written once
        return "auto" if _boolean(value) else "always"
    strict = not as_text or setting.base is tuple
    converted = msgspec.convert(value, setting.annotation, strict=strict)
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError
    return converted


def _boolean(value: Any) -> bool:
    found = _BOOLEANS.get(str(value).lower()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise _NotAllowedError("expected true or false (or 1, 0, yes, no, on, off)")
    return found


def _plugin(group: plugins.Group, value: str) -> str:
    listed = plugins.names(group)
    if value.lower() not in listed:
        raise _NotAllowedError(f"there is {', '.join(listed)} in this version")
    return value.lower()


def _cache_policy(value: str) -> str:
    return _plugin("policies", value).upper()


def _remote_serde(value: str) -> str:
    try:
        parse_codec(value)
    except ValueError as error:
        raise _NotAllowedError(str(error)) from None
    return value.lower()


def _one_of(*allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value.lower() not in allowed:
            raise _NotAllowedError(f"expected {', '.join(allowed)}{nearest(value, allowed)}")
        return value.lower()

    return check


def _log_level(value: str) -> str:
    level = {"WARN": "WARNING"}.get(value.upper(), value.upper())
    if level not in _LOG_LEVELS:
        raise _NotAllowedError(f"expected {', '.join(_LOG_LEVELS)}")
    return level


def _server_url(value: str) -> str:
    allowed = _NotAllowedError("expected tcp://HOST:PORT or ipc://PATH")
    try:
        parts = urlsplit(value)
        tcp = parts.scheme == "tcp" and parts.hostname and parts.port and not parts.path.strip("/")
    except ValueError:
        raise allowed from None
    if not tcp and not (parts.scheme == "ipc" and len(value) > len("ipc://")):
        raise allowed
    return value.rstrip("/") if tcp else value


def parse_directory(value: str, scheme: str = "file") -> str:
    """An absolute path, from a path or a ``file://`` URL (``file://x/y`` is ``x/y``, as in LMCache).

    Raises:
        ValueError: it is neither.
    """
    if re.search(r",\s*(file://|/)", value):
        raise _NotAllowedError("expected one directory; for several use the key 'tiers'")
    path = value
    if "://" in value:
        found, _, rest = value.partition("://")
        if found.lower() != scheme:
            raise _NotAllowedError(f"expected a path or a {scheme}:// URL")
        path = unquote(rest.removeprefix("localhost") if rest.startswith("localhost/") else rest)
    if not path:
        raise _NotAllowedError(f"expected a path or a {scheme}:// URL")
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # ~name of nobody
        raise _NotAllowedError(str(error)) from None


_REDIS_SCHEMES = (
    *(
        f"{name}{suffix}"
        for name in ("redis", "rediss", "valkey", "valkeys")
        for suffix in ("-sentinel", "-cluster")
    ),
    *("rediss", "valkey", "valkeys", "unix"),
)
SCHEME_KINDS = {"lms": "lm"} | dict.fromkeys(_REDIS_SCHEMES, "redis")
"""URL schemes whose tier goes by another name. Every other scheme is the name of its tier."""


def directory_options(url: str) -> dict[str, Any]:
    """The options that the URL of a tier of files stands for: ``file:///DIR?max_bytes=N``, ``disk:///DIR``.

    Raises:
        ValueError: there is no directory in it.
    """
    scheme = url.partition("://")[0].lower()
    address, _, query = url.partition("?")
    given = dict(parse_qsl(query, strict_parsing=bool(query)))
    numbers = {name: int(value) if value.isdecimal() else value for name, value in given.items()}
    return {"path": parse_directory(address, scheme)} | numbers


DIRECTORY_SCHEMES = ("disk", "file")
"""Schemes whose URL is a directory."""


def url_kind(url: str) -> str:
    """The kind of tier behind ``url``.

    Raises:
        ValueError: no tier of this installation has that scheme; the message says which there are.
    """
    kinds = plugins.names("tiers")
    schemes = [name for name in (*kinds, *SCHEME_KINDS) if SCHEME_KINDS.get(name, name) in kinds]
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    kind = SCHEME_KINDS.get(scheme, scheme)
    if kind not in kinds:
        listed = ", ".join(f"{name}://" for name in sorted(schemes))
        raise _NotAllowedError(f"this version has tiers for {listed}")
    return kind


def _remote_url(value: str) -> str:
    url_kind(value)
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "cache_policy": _cache_policy,
    "remote_serde": _remote_serde,
    "gate": _one_of("auto", "always", "never"),
    "read_policy": _one_of("first", "fastest"),
    "isolation": _one_of("none", "salt"),
    "log_level": _log_level,
    "server_url": _server_url,
    "local_disk": parse_directory,
    "encryption_key_file": parse_directory,
    "shm_dir": parse_directory,
    "runtime_dir": parse_directory,
    "remote_url": _remote_url,
}
