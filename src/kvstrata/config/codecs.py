"""How a codec is spelled: ``NAME``, ``NAME:VALUE`` or ``NAME:OPTION=VALUE,OPTION=VALUE``, chained by ``+``.

``zstd``, ``zstd:3`` (the value of its first option), ``zstd:level=3``, ``zstd:3+aesgcm``. Case does not matter.
A value is a number or a word; what an option wants from a file is a setting of its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from kvstrata import plugins
from kvstrata.config.nearest import nearest

MAX_NAME = 16
"""Characters of a codec's name, the whole chain's, that a frame has room for."""

_OPTION = re.compile(r"(?:(?P<key>[a-z_]+)=)?(?P<value>[a-z0-9._-]+)")


def parse_codec(text: str) -> list[tuple[str, dict[str, str]]]:
    """Names and options of the codecs of a chain, in the order of encoding; checked by their plug-ins.

    Raises:
        ValueError: it is spelled wrong or makes no sense; the message says what is allowed.
        PluginError: a codec cannot be loaded; the message says what to install.
    """
    codecs = [_one(part.strip()) for part in text.split("+")]
    fault = chain_fault([plugins.load("codecs", name).stage for name, _ in codecs])
    if fault:
        raise ValueError(fault)
    chain = "+".join(name for name, _ in codecs)
    if len(chain) > MAX_NAME:
        raise ValueError(
            f"a frame has no room for the name {chain!r}, {len(chain)} characters of {MAX_NAME} at most: leave one "
            "codec out or choose one with a shorter name"
        )
    return codecs


def chain_fault(stages: Sequence[int]) -> str:
    """Why codecs of these stages (``codecs.base.Stage``) cannot be chained in this order; empty when they can."""
    if len(stages) > 1 and stages[0] == 0:
        return "a codec that stores bytes as they are stands alone"
    if any(first >= second for first, second in itertools.pairwise(stages)):
        return "a chain quantises first, then compresses, then encrypts, each at most once"
    return ""


def _one(text: str) -> tuple[str, dict[str, str]]:
    name, colon, rest = text.lower().partition(":")
    known = plugins.names("codecs")
    if name not in known:
        raise ValueError(
            f"no codec {name!r} in this version{nearest(name, known)}; there is {', '.join(known)}"
        )
    options_type = plugins.load("codecs", name).Options
    fields = options_type.__struct_fields__
    options: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        match = _OPTION.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"codec {name!r}: expected {name}:VALUE or {name}:OPTION=VALUE,OPTION=VALUE; a value is a number "
                "or a word"
            )
        key = match["key"] or (fields[0] if fields and not options else "")
        if key not in fields:
            listed = ", ".join(fields) or "none"
            raise ValueError(f"codec {name!r} has no option {key or part!r}; it has {listed}")
        if key in options:
            raise ValueError(f"codec {name!r} has two values for {key}")
        options[key] = match["value"]
        _check(name, key, match["value"], options_type)
    return name, options


def _check(name: str, key: str, value: str, options_type: Any) -> None:
    try:
        msgspec.convert({key: value}, options_type, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"codec {name!r}: {key} {value!r}: expected {_allowed(options_type, key) or error}"
        ) from None


def _allowed(options_type: Any, key: str) -> str:
    """What an option takes, for people; empty for types that codecs of ours do not have."""
    for field in msgspec.structs.fields(options_type):
        if field.name == key:
            kind = msgspec.inspect.type_info(field.type)
            if isinstance(kind, msgspec.inspect.LiteralType):
                return ", ".join(map(str, kind.values))
            if isinstance(kind, msgspec.inspect.IntType):
                return f"an integer from {kind.ge} to {kind.le}"
    return ""
