"""All checks in their order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from kvstrata.cache.build import check_tiers
from kvstrata.config import Resolved, load_settings, tier_configs
from kvstrata.doctor.engine import check_engine
from kvstrata.doctor.finding import Finding, Level
from kvstrata.doctor.machine import check_clock, check_files, check_kernel, check_memory, check_shm
from kvstrata.doctor.model import check_model
from kvstrata.doctor.reach import check_http, check_tier
from kvstrata.doctor.units import check_units
from kvstrata.errors import ConfigError, PluginError


def examine(
    config_file: Path | None, files: Iterable[Path] = (), *, engine: bool = True, model: Path | None = None
) -> Iterator[Finding]:
    """Check this machine, the configuration and other ``files`` (a chart's values, a redis.conf).

    Tiers are asked whether they answer; nothing is written. ``engine``: also import vLLM, which takes seconds.
    ``model``: the ``config.json`` of what is to be served.
    """
    yield check_kernel()
    yield check_files()
    yield check_clock()
    named = config_file or os.environ.get("KVSTRATA_CONFIG_FILE") or os.environ.get("LMCACHE_CONFIG_FILE")
    for file in [*([Path(named)] if named else []), *files]:
        yield from check_units(file)
    resolved = None
    try:
        resolved = load_settings(file=config_file)
    except (ConfigError, PluginError) as error:
        yield Finding(
            "configuration", Level.ERROR, str(error), "correct it; 'kvstrata config check FILE' tries again"
        )
    if resolved is not None:
        yield from _check_configured(resolved)
        if model is not None:
            yield check_model(model, resolved.settings)
    if engine:
        yield from check_engine()


def _check_configured(resolved: Resolved) -> Iterator[Finding]:
    settings = resolved.settings
    try:
        configs, *_ = check_tiers(settings)
    except (ConfigError, PluginError) as error:
        configs = tier_configs(settings)
        yield Finding("configuration", Level.ERROR, str(error), "without that the server does not start")
    else:
        yield Finding("configuration", Level.OK, "every setting is allowed")
    for notice in resolved.notices:
        yield Finding("configuration", Level.WARNING, notice, "remove it, or use the setting that it names")
    yield check_memory(settings.max_local_cpu_bytes)
    yield check_shm(settings.shm_dir, settings.max_local_cpu_bytes)
    yield check_http(settings)
    if not configs:
        yield Finding(
            "tiers",
            Level.NOTE,
            "there is no tier below L1: what is cached is lost with the server",
            "set local_disk or remote_url to start warm after a restart",
        )
    for config in configs:
        yield from check_tier(config)
