"""The options of ``lmcache server``, as those of ``kvstrata server``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from kvstrata.config.lmcache import LMCACHE_OPTIONS, without_effect
from kvstrata_lmcache.l2 import tier_of
from kvstrata_lmcache.parser import OneLineParser

_KINDS: dict[str, dict[str, Any]] = {
    "one value": {"action": "append"},
    "values": {"nargs": "*"},
    "no value": {"action": argparse.BooleanOptionalAction},
}


def server_arguments(given: list[str]) -> list[str]:
    """What to give to ``kvstrata server``. What has no effect there is named on standard error, in one line.

    Options that LMCache has not are left as they are: they are ours, or ``kvstrata server`` says what is wrong.
    """
    parser = OneLineParser(
        prog="lmcache server", allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS
    )
    for name, option in LMCACHE_OPTIONS.items():
        parser.add_argument(name, dest=name, **_KINDS[option.takes])
    known, ours = parser.parse_known_args(given)
    options: dict[str, Any] = vars(known)
    listed = without_effect([name for name in options if _asks(name, options[name])], LMCACHE_OPTIONS)
    if listed:
        print(f"lmcache server: options without effect here; {listed}", file=sys.stderr)
    tiers: list[dict[str, Any]] = []
    for text in options.get("--l2-adapter", ()):
        try:
            tiers.append(tier_of(json.loads(text)))
        except ValueError as error:
            parser.error(f"--l2-adapter: {error}")
    same = [name for name in options if LMCACHE_OPTIONS[name].fate == "same"]
    arguments = [word for name in same for word in (name, options[name][-1])]
    if tiers:
        arguments += ["--set", f"tiers={json.dumps(tiers)}"]
    if options.get("--enable-tracing"):
        arguments += ["--set", "tracing=true"]
    return [*arguments, *ours]


def _asks(name: str, value: Any) -> bool:
    """Whether an option asks for something: it is not switched off, empty, or what happens anyway."""
    return value not in (False, [], [LMCACHE_OPTIONS[name].harmless])
