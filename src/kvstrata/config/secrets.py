"""Secrets are masked wherever a setting is shown: logs, errors, ``config show``, ``repr``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<userinfo>.*)@(?P<rest>.*)", re.S)
_SECRET_NAME = re.compile(
    r"pass(word|wd|phrase)?$|secret|token$|credential|^salt$|api_?key|access_?key|private_?key|signature|^auth$",
    re.I,
)
_QUERY = re.compile(r"(?P<head>[?&;])(?P<name>[^=&;#\s]+)=(?P<value>[^&;#\s]*)")


def mask_url(text: str) -> str:
    """The URL ``text`` with its password, a user name that stands alone, and secret query parameters masked.

    Made for whatever a person may have typed: all up to the last ``@`` counts as user and password, so that a
    password with ``/``, ``@`` or a space in it does not show either. The name before a password stays.
    """

    def userinfo(match: re.Match[str]) -> str:
        if any(_SECRET_NAME.search(found["name"]) for found in _QUERY.finditer(match["userinfo"])):
            return f"{match['scheme']}{MASK}"  # the @ may be in a secret of the query, and the rest its end
        user, colon, _ = match["userinfo"].partition(":")
        shown = f"{user}:{MASK}" if colon else MASK
        return f"{match['scheme']}{shown}@{match['rest']}"

    def parameter(match: re.Match[str]) -> str:
        value = MASK if _SECRET_NAME.search(match["name"]) else match["value"]
        return f"{match['head']}{match['name']}={value}"

    return _QUERY.sub(parameter, _USERINFO.sub(userinfo, text))


def mask(value: Any, key: str = "") -> Any:
    """``value`` of the setting or option ``key`` as it may be shown; looks into mappings and lists."""
    if isinstance(value, Mapping):
        return {name: mask(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask(item, key) for item in value]
    if value is not None and _SECRET_NAME.search(key):
        return MASK
    return mask_url(value) if isinstance(value, str) else value
