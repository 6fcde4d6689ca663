"""``kvstrata keys``: list, count, show and delete what the tiers below L1 hold."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from kvstrata.cli.output import FAULT, AsJson, ConfigFile, print_json, print_table
from kvstrata.config import TierConfig, load_settings, tier_configs, tier_from_url, unbounded
from kvstrata.errors import ConfigError
from kvstrata.tiers.base import Tier
from kvstrata.tiers.inspect import inspect_frame, opened_tier
from kvstrata.types import Miss, parse_key

app = typer.Typer(
    help="List, count, show and delete entries of the tiers below L1.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Example: kvstrata keys count --tier redis://127.0.0.1:6379",
)

_DELETE_BATCH = 256

TierOption = Annotated[
    str | None,
    typer.Option(
        "--tier",
        metavar="URL|NAME",
        help="A tier's URL (redis://HOST:PORT, disk:///DIR) or its name in the configuration. "
        "Default: all that are configured.",
    ),
]
Prefix = Annotated[str, typer.Option("--prefix", help="Only keys that begin so.")]


@app.command(
    "list", epilog="Example: kvstrata keys list --tier disk:///var/cache/kv --prefix vllm@ --limit 10"
)
def list_keys(
    tier: TierOption = None,
    prefix: Prefix = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many keys of each tier.")] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Print the keys that are held.

    One a line: the tier's name, then the key.
    """
    listed: dict[str, list[str]] = {}
    for config in _selected(tier, config_file):
        with opened_tier(config) as opened:
            keys = itertools.islice(opened.scan(prefix), limit)
            if as_json:
                listed[config.name] = sorted(keys)
                continue
            for key in keys:
                print(f"{config.name}\t{key}")
    if as_json:
        print_json({"tiers": [{"tier": name, "keys": keys} for name, keys in listed.items()]})


@app.command(epilog="Example: kvstrata keys count --prefix vllm@meta-llama/Llama-3.1-8B-Instruct@")
def count(
    tier: TierOption = None, prefix: Prefix = "", config_file: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Count the keys that are held."""
    counts: dict[str, int] = {}
    for config in _selected(tier, config_file):
        with opened_tier(config) as opened:
            counts[config.name] = sum(1 for _ in opened.scan(prefix))
    if as_json:
        tiers = [{"tier": name, "keys": number} for name, number in counts.items()]
        print_json({"tiers": tiers, "total": sum(counts.values())})
    else:
        print_table(("tier", "keys"), [(name, str(number)) for name, number in counts.items()])


@app.command(epilog="Example: kvstrata keys show vllm@m@1@0@a1b2... --tier redis://127.0.0.1:6379")
def show(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="The whole key, as 'kvstrata keys list' prints it.")
    ],
    tier: TierOption = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Print what is known of one entry, from its frame. Exit status 1 when no tier holds it."""
    try:
        parse_key(key)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found = []
    for config in _selected(tier, config_file):
        with opened_tier(config) as opened:
            found.append({"tier": config.name} | _describe(opened, key))
    if as_json:
        print_json({"key": key, "entries": found})
    for entry in found if not as_json else ():
        print_table(("field", "value"), [(name, str(value)) for name, value in entry.items()])
    return 0 if any(entry["held"] for entry in found) else FAULT


@app.command(epilog="Example: kvstrata keys delete vllm@my-model@ --tier redis://127.0.0.1:6379 --yes")
def delete(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Keys that begin so; '' is all of them.")],
    tier: TierOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Delete all keys that begin with PREFIX, after asking."""
    if not yes and (as_json or not sys.stdin.isatty()):
        raise typer.BadParameter("nobody to ask: add --yes")
    deleted: dict[str, int] = {}
    for config in _selected(tier, config_file):
        with opened_tier(config) as opened:
            keys = list(opened.scan(prefix))
            question = f"Delete {len(keys)} keys that begin with {prefix!r} from {opened.describe()}?"
            if keys and not yes and not typer.confirm(question):
                continue
            batches = (keys[start : start + _DELETE_BATCH] for start in range(0, len(keys), _DELETE_BATCH))
            deleted[config.name] = sum(opened.delete(batch) for batch in batches)
    if as_json:
        tiers = [{"tier": name, "deleted": number} for name, number in deleted.items()]
        print_json({"tiers": tiers, "total": sum(deleted.values())})
    else:
        print_table(("tier", "deleted"), [(name, str(number)) for name, number in deleted.items()])


def _selected(tier: str | None, config_file: Path | None) -> list[TierConfig]:
    """The tiers that a command is about."""
    if tier is not None and "://" in tier:
        return [tier_from_url(tier)]
    configured = [unbounded(config) for config in tier_configs(load_settings(file=config_file).settings)]
    chosen = [config for config in configured if tier in (None, config.name)]
    if not chosen:
        wanted = "no tier" if tier is None else f"no tier {tier!r}"
        listed = f" (there is: {', '.join(config.name for config in configured)})" if configured else ""
        raise ConfigError(f"{wanted} is configured{listed}; give --tier URL, redis://HOST:PORT say")
    return chosen


def _describe(tier: Tier, key: str) -> dict[str, Any]:
    """What the frame under ``key`` says of itself, and whether it is whole."""
    found = inspect_frame(tier, key)
    if isinstance(found, Miss):
        return {"held": False, "reason": found.reason.value}
    described: dict[str, Any] = {"held": True, "frame_bytes": found.frame_bytes, "intact": not found.fault}
    if found.fault:
        described["fault"] = found.fault
    if found.header is not None:
        for name, value in msgspec.structs.asdict(found.header).items():
            described[name] = value.hex() if isinstance(value, bytes) else value
    return described
