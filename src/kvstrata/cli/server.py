"""``kvstrata server``: run a cache server that several inference engines share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer

from kvstrata.cli.output import ConfigFile
from kvstrata.config import ALIASES, DEFAULT, SETTINGS, Settings, load_settings, tier_configs
from kvstrata.logs import configure_logging

EXAMPLE = "Example: kvstrata server --l1-size-gb 20 --eviction-policy LRU --chunk-size 256"

log = logging.getLogger(__name__)


def _option(flag: str, key: str, metavar: str) -> Any:
    setting = SETTINGS[key]
    unit = f" [{setting.unit}]" if setting.unit else ""
    default = "" if setting.default is None else f" Default: {setting.default}."
    return typer.Option(
        flag, metavar=metavar, help=f"{setting.meta.description}{unit}{default}".replace("`", "")
    )


_OPEN_READS = typer.Option("--http-open-reads", help="Requests that only read (GET) go without the token.")


def server(
    *,
    l1_size_gb: Annotated[float | None, _option("--l1-size-gb", "max_local_cpu_size", "GIB")] = None,
    eviction_policy: Annotated[str | None, _option("--eviction-policy", "cache_policy", "NAME")] = None,
    chunk_size: Annotated[int | None, _option("--chunk-size", "chunk_size", "TOKENS")] = None,
    host: Annotated[str | None, _option("--host", "host", "ADDRESS")] = None,
    port: Annotated[int | None, _option("--port", "port", "PORT")] = None,
    http_host: Annotated[str | None, _option("--http-host", "http_host", "ADDRESS")] = None,
    http_port: Annotated[int | None, _option("--http-port", "http_port", "PORT")] = None,
    http_token_file: Annotated[str | None, _option("--http-token-file", "http_token_file", "FILE")] = None,
    http_open_reads: Annotated[bool | None, _OPEN_READS] = None,
    local_disk: Annotated[str | None, _option("--local-disk", "local_disk", "DIR")] = None,
    max_local_disk_size: Annotated[
        float | None, _option("--max-local-disk-size", "max_local_disk_size", "GIB")
    ] = None,
    remote_url: Annotated[str | None, _option("--remote-url", "remote_url", "URL")] = None,
    remote_serde: Annotated[str | None, _option("--remote-serde", "remote_serde", "NAME")] = None,
    ttl_seconds: Annotated[int | None, _option("--ttl-seconds", "ttl_seconds", "SECONDS")] = None,
    shm_dir: Annotated[str | None, _option("--shm-dir", "shm_dir", "DIR")] = None,
    log_level: Annotated[str | None, _option("--log-level", "log_level", "LEVEL")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; may be given several times."),
    ] = None,
    config_file: ConfigFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the process id, addresses and tiers as one line of JSON.")
    ] = False,
) -> int:
    """Run a cache server until it is told to end (SIGTERM, SIGINT).

    Inference engines of this host share its host memory (L1) and its tiers. Options not given come from the
    configuration file and the environment; see 'kvstrata config show'.
    """
    overrides = {
        "max_local_cpu_size": l1_size_gb,
        "cache_policy": eviction_policy,
        "chunk_size": chunk_size,
        "host": host,
        "port": port,
        "http_host": http_host,
        "http_port": http_port,
        "http_token_file": http_token_file,
        "http_open_reads": http_open_reads,
        "local_disk": local_disk,
        "max_local_disk_size": max_local_disk_size,
        "remote_url": remote_url,
        "remote_serde": remote_serde,
        "ttl_seconds": ttl_seconds,
        "shm_dir": shm_dir,
        "log_level": log_level,
    }
    # Here, because the server's dependencies take a while to import and no other command needs them.
    from kvstrata.server.lifecycle import DEFAULT_HTTP_PORT, run  # noqa: PLC0415

    resolved = load_settings(file=config_file, overrides=overrides | _more(more or [], overrides))
    settings = resolved.settings
    if resolved.sources["http_port"] == DEFAULT:
        settings = msgspec.structs.replace(settings, http_port=DEFAULT_HTTP_PORT)
    configure_logging(settings.log_level)
    for notice in resolved.notices:
        log.warning("%s", notice)
    return run(settings, _announce(settings) if as_json else None)


def _announce(settings: Settings) -> Callable[[str, str | None], None]:
    """Prints where the server is, as one line and at once: whoever started it reads that while it runs."""

    def announce(endpoint: str, http_url: str | None) -> None:
        tiers = ["l1", *(tier.name for tier in tier_configs(settings))]
        about = {"pid": os.getpid(), "url": endpoint, "http": http_url, "tiers": tiers}
        print(msgspec.json.encode(about).decode(), flush=True)

    return announce


def _more(pairs: list[str], given: dict[str, Any]) -> dict[str, str]:
    """The settings of ``--set``."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        key = ALIASES.get(name, name)
        if not separator:
            raise typer.BadParameter(f"--set {name}: expected KEY=VALUE")
        if key in values or given.get(key) is not None:
            raise typer.BadParameter(f"--set {name}: {key} is given twice")
        values[key] = value
    return values
