"""From defaults, environment, file and arguments to one checked :class:`Settings`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kvstrata.config.lmcache import LMCACHE_KEYS, without_effect
from kvstrata.config.nearest import nearest
from kvstrata.config.quotas import quota_configs
from kvstrata.config.settings import ALIASES, SETTINGS, Settings
from kvstrata.config.tiers import tier_configs
from kvstrata.config.values import parse
from kvstrata.errors import ConfigError

DEFAULT = "default"

_OWN_PREFIX = "KVSTRATA_"
_LMCACHE_PREFIX = "LMCACHE_"
_CONFIG_FILE = "CONFIG_FILE"
_KNOWN = sorted({*SETTINGS, *ALIASES})
# Kubernetes puts the address of every Service into the environment: a Service "kvstrata" makes KVSTRATA_PORT.
_SERVICE_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?$")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


class Resolved(msgspec.Struct, frozen=True):
    """Settings, and where each comes from."""

    settings: Settings
    sources: dict[str, str]
    """For every key ``"default"`` or the place that decided, as a person would name it."""
    notices: tuple[str, ...] = ()
    """What to log once, at WARNING: settings that were read and have no effect."""


def load_settings(
    environ: Mapping[str, str] | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Resolved:
    """Gather and check all settings. Later sources win: defaults, environment, file, connector, arguments.

    Args:
        environ: the environment; that of this process when None.
        file: a YAML file, instead of the one that the environment names.
        extra_config: the connector's ``kv_connector_extra_config``; its keys may begin with ``kvstrata.`` or
            ``lmcache.``.
        overrides: arguments, by key; None means not given.

    Raises:
        ConfigError: a value is wrong, a key is unknown, a file cannot be read.
        PluginError: a tier that is asked for cannot be loaded.
    """
    environ = os.environ if environ is None else environ
    ignored: dict[str, str] = {}
    lmcache, own, notices = _from_environment(environ, ignored)
    path, file_notices = _config_file(environ, file)
    layers = [lmcache, own, _from_file(path, ignored) if path else _Layer(ignored)]
    layers.append(_from_extra_config(extra_config or {}, ignored))
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    layers.append(_Layer(ignored).fill((key, value, "argument", False) for key, value in given.items()))

    values: dict[str, Any] = {}
    sources = dict.fromkeys(SETTINGS, DEFAULT)
    for layer in layers:
        values |= layer.values
        sources |= layer.sources
    settings = Settings(**values)
    _check_together(settings)
    return Resolved(settings, sources, (*notices, *file_notices, *_name_ignored(ignored)))


class _Layer:
    """The settings of one source, parsed. Keys that LMCache has and this does not go into ``ignored``."""

    def __init__(self, ignored: dict[str, str]) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self._ignored = ignored
        self._server: dict[str, tuple[Any, str]] = {}

    def fill(self, items: Iterable[tuple[str, Any, str, bool]]) -> _Layer:
        """Take (name, value, source, whether LMCache's names are welcome) of each item."""
        for name, value, source, lmcache in items:
            key = ALIASES.get(name, name)
            if key in SETTINGS:
                self._set(key, parse(SETTINGS[key], value, source), source)
            elif lmcache and name in ("mp_host", "mp.host", "mp_port", "mp.port"):
                self._server[name[3:]] = (value, source)
            elif lmcache and name in LMCACHE_KEYS:
                if value not in (None, False, "", 0) and str(value).lower() not in ("false", "none"):
                    self._ignored[name] = source
            else:
                raise ConfigError(f"unknown key {name!r} ({source}){nearest(name, _KNOWN)}")
        self._set_server_url()
        return self

    def _set(self, key: str, value: Any, source: str) -> None:
        if key in self.values and self.values[key] != value:
            raise ConfigError(f"{key} is given twice with different values: {self.sources[key]} and {source}")
        self.values[key], self.sources[key] = value, source

    def _set_server_url(self) -> None:
        """LMCache has host and port of its server apart; its host may begin with ``tcp://``."""
        if not self._server or "server_url" in self.values:
            return
        host, host_source = self._server.get("host", ("127.0.0.1", ""))
        port, port_source = self._server.get("port", (5555, ""))
        url = f"tcp://{str(host).removeprefix('tcp://')}:{port}"
        source = " and ".join(filter(None, (host_source, port_source)))
        self._set("server_url", parse(SETTINGS["server_url"], url, source), source)


def _from_environment(
    environ: Mapping[str, str], ignored: dict[str, str]
) -> tuple[_Layer, _Layer, list[str]]:
    lmcache, own, unknown = [], [], []
    for variable, value in sorted(environ.items()):
        prefix = next((p for p in (_OWN_PREFIX, _LMCACHE_PREFIX) if variable.startswith(p)), None)
        name = variable.removeprefix(prefix or "")
        if prefix is None or name == _CONFIG_FILE or not value.strip() or _is_service_link(variable, value):
            continue
        item = (name.lower(), value, f"environment variable {variable}", prefix == _LMCACHE_PREFIX)
        if prefix == _OWN_PREFIX:
            own.append(item)
        elif name.lower() in LMCACHE_KEYS or name.lower() in ALIASES:
            lmcache.append(item)
        else:
            unknown.append(variable + nearest(name, sorted(LMCACHE_KEYS)))
    below, above = _Layer(ignored).fill(lmcache), _Layer(ignored).fill(own)
    notices = [
        f"{above.sources[key]} is used, {below.sources[key]} says otherwise"
        for key in above.values
        if key in below.values and below.values[key] != above.values[key]
    ]
    if unknown:
        notices.append(f"unknown environment variables, without effect: {', '.join(unknown)}")
    return below, above, notices


def _is_service_link(variable: str, value: str) -> bool:
    address = variable.endswith("_PORT") and _SERVICE_ADDRESS.match(value)
    return bool(address or _SERVICE_LINK.search(variable))


def _config_file(
    environ: Mapping[str, str], file: str | os.PathLike[str] | None
) -> tuple[Path | None, list[str]]:
    if file is not None:
        return Path(file), []
    own, lmcache = environ.get(_OWN_PREFIX + _CONFIG_FILE), environ.get(_LMCACHE_PREFIX + _CONFIG_FILE)
    notices = []
    if own and lmcache and own != lmcache:
        notices = [
            f"{_OWN_PREFIX + _CONFIG_FILE} is used, {_LMCACHE_PREFIX + _CONFIG_FILE} names another file"
        ]
    path = own or lmcache
    return (Path(path) if path else None), notices


def _from_file(path: Path, ignored: dict[str, str]) -> _Layer:
    content = _read_yaml(path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"file {path}: expected a mapping of keys to values at the top")
    return _Layer(ignored).fill((str(key), value, f"file {path}", True) for key, value in content.items())


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping; YAML's parser would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key_node.value!r} stands there twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"configuration file {path} is not UTF-8 text") from None
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        # Only place and problem: the text around it may hold a password.
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"configuration file {path}{place} is not valid YAML: {problem}") from None


def _from_extra_config(extra_config: Mapping[str, Any], ignored: dict[str, str]) -> _Layer:
    def item(name: str, value: Any) -> tuple[str, Any, str, bool]:
        own = name.startswith("kvstrata.")
        key = name.removeprefix("kvstrata.").removeprefix("lmcache.")
        return key, value, f"kv_connector_extra_config {name!r}", not own

    return _Layer(ignored).fill(item(name, value) for name, value in extra_config.items())


def _check_together(settings: Settings) -> None:
    if settings.local_disk is not None and settings.max_local_disk_size == 0:
        raise ConfigError(
            "max_local_disk_size = 0 is not allowed together with local_disk: expected more than 0 GiB"
        )
    tier_configs(settings)
    quota_configs(settings)


def _name_ignored(ignored: Mapping[str, str]) -> list[str]:
    """One message about all of LMCache's keys that have no effect here."""
    listed = without_effect(ignored, LMCACHE_KEYS)
    return [f"settings of LMCache without effect here; {listed}"] if listed else []
