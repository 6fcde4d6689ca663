"""``kvstrata config``: show what is in force and where it comes from, check a file, print the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvstrata.cli.output import AsJson, ConfigFile, print_json, print_notices, print_table
from kvstrata.config import SETTINGS, Resolved, load_settings, mask, tier_configs
from kvstrata.config.memory import check_redis_config
from kvstrata.config.migration import migration_text
from kvstrata.config.reference import reference_text
from kvstrata.errors import ConfigError, PluginError

app = typer.Typer(
    help="Show or check the configuration.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Example: kvstrata config show --config kvstrata.yaml",
)

_INVALID = 2


@app.command(epilog="Example: LMCACHE_CHUNK_SIZE=128 kvstrata config show")
def show(config_file: ConfigFile = None, as_json: AsJson = False) -> None:
    """Print every setting in force, its source and its default. Secrets are masked."""
    resolved = load_settings(file=config_file)
    tiers = [
        {"name": tier.name, "kind": tier.kind, "codec": tier.codec, "write_policy": tier.write_policy}
        | {"options": mask(tier.options)}
        for tier in tier_configs(resolved.settings)
    ]
    if as_json:
        print_json({"settings": _shown(resolved), "tiers": tiers, "notices": resolved.notices})
        return
    rows = [
        (key, _text(row["value"]), row["source"], _text(row["default"]))
        for key, row in _shown(resolved).items()
    ]
    print_table(("key", "value", "source", "default"), rows)
    print()
    print("tiers, in the order they are asked:", ", ".join(["l1", *(str(tier["name"]) for tier in tiers)]))
    print_notices(resolved.notices)


@app.command(epilog="Example: kvstrata config check lmcache_config.yaml")
def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML file to check, by itself; or a redis.conf.")
    ],
    as_json: AsJson = False,
) -> int:
    """Check a configuration file.

    The exit status is 0 when it is right, 2 when not.

    A note says what a server would lack that has this file alone; variables may add it.

    Of a redis.conf (a name that ends so: .conf) the memory values are checked: Redis' units are not Kubernetes'.
    """
    try:
        notices = _check_redis(file) if file.suffix == ".conf" else _check_settings(file)
    except (ConfigError, PluginError) as error:
        if not as_json:
            raise
        print_json({"file": str(file), "ok": False, "error": str(error), "notices": []})
        return _INVALID
    if as_json:
        print_json({"file": str(file), "ok": True, "error": None, "notices": notices})
    else:
        print(f"{file}: ok")
        print_notices(notices)
    return 0


def _check_redis(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"configuration file {file} cannot be read: {reason}") from None
    check_redis_config(lines)
    return []


def _check_settings(file: Path) -> list[str]:
    """What to note. What the file lacks may come from the environment, so it is no error here."""
    from kvstrata.cache.build import check_tiers  # noqa: PLC0415  takes a while to import

    resolved = load_settings({}, file=file)
    try:
        check_tiers(resolved.settings)
    except (ConfigError, PluginError) as error:
        return [*resolved.notices, f"with this file alone a server does not start: {error}"]
    return list(resolved.notices)


@app.command(hidden=True, epilog="Example: kvstrata config docs > docs/configuration.md")
def docs() -> None:
    """Print the configuration reference in Markdown."""
    print(reference_text(), end="")


@app.command(hidden=True, epilog="Example: kvstrata config migration > docs/migrate-from-lmcache.md")
def migration() -> None:
    """Print the guide for those who come from LMCache in Markdown."""
    print(migration_text(), end="")


def _shown(resolved: Resolved) -> dict[str, dict[str, Any]]:
    return {
        key: {
            "value": mask(getattr(resolved.settings, key), key),
            "source": resolved.sources[key],
            "default": setting.default,
        }
        for key, setting in SETTINGS.items()
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None or value in ([], ()) else str(value)
