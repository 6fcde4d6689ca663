"""From settings to the ordered list of tiers below L1."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec

from kvstrata import plugins
from kvstrata.config.codecs import parse_codec
from kvstrata.config.nearest import nearest
from kvstrata.config.secrets import mask
from kvstrata.config.settings import Settings
from kvstrata.config.values import DIRECTORY_SCHEMES, directory_options, url_kind
from kvstrata.errors import ConfigError

NO_BUDGET_BYTES = 2**62

WritePolicy = Literal["all", "second_use", "none"]


class TierConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One tier to be opened. Its options have been checked by the tier's own ``Options``."""

    kind: str
    """The name of its plug-in."""
    name: str
    """Unique among the tiers of one configuration; a label of metrics and logs."""
    codec: str = "naive"
    write_policy: WritePolicy = "all"
    """"all": it gets what is stored. "second_use": what is used a second time. "none": it is only read from."""
    options: dict[str, Any] = {}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={mask(getattr(self, key))!r}" for key in self.__struct_fields__)
        return f"TierConfig({shown})"


class _Entry(msgspec.Struct, frozen=True):
    """What an item of ``tiers`` may have besides the options of its kind."""

    kind: str | None = None
    url: str | None = None
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    codec: str = "naive"
    write_policy: WritePolicy = "all"


def tier_configs(settings: Settings) -> list[TierConfig]:
    """The tiers that ``settings`` ask for, in the order in which they are asked:
    ``local_disk``, ``remote_url``, then ``tiers`` as listed.

    Raises:
        ConfigError: an item of ``tiers`` or an option of a tier is wrong.
    """
    configs: list[TierConfig] = []
    if settings.local_disk is not None:
        options = {"path": settings.local_disk, "max_bytes": settings.max_local_disk_bytes}
        configs.append(_checked(settings, "local_disk", "disk", _Entry(), options))
    if settings.remote_url is not None:
        options = _url_options("remote_url", settings.remote_url)
        if settings.ttl_seconds is not None:
            options["ttl_seconds"] = settings.ttl_seconds
        entry = _Entry(codec=settings.remote_serde)
        configs.append(_checked(settings, "remote_url", url_kind(settings.remote_url), entry, options))
    configs.extend(_from_item(settings, f"tiers[{index}]", item) for index, item in enumerate(settings.tiers))
    return _named_apart(configs)


def tier_from_url(url: str, settings: Settings | None = None) -> TierConfig:
    """The tier at ``url`` for looking at it: options at their defaults, and no budget that would evict.

    Raises:
        ConfigError: there is no tier for such a URL, or it is wrong.
    """
    try:
        kind = url_kind(url)
    except ValueError as error:
        raise ConfigError(f"URL {mask(url)!r} is not allowed: {error}") from None
    item: dict[str, Any] = {"url": url}
    if "max_bytes" in plugins.load("tiers", kind).Options.__struct_fields__:
        item["max_bytes"] = NO_BUDGET_BYTES
    return _from_item(settings or Settings(), "URL", item)


def unbounded(config: TierConfig) -> TierConfig:
    """``config`` without its budget, so that opening the tier for a look evicts nothing."""
    if "max_bytes" not in config.options:
        return config
    return msgspec.structs.replace(config, options=config.options | {"max_bytes": NO_BUDGET_BYTES})


def _from_item(settings: Settings, where: str, item: dict[str, Any]) -> TierConfig:
    policy, policies = item.get("write_policy", "all"), get_args(WritePolicy)
    if policy not in policies:
        listed = ", ".join(policies)
        raise ConfigError(
            f"{where}: write_policy {policy!r} is not allowed: expected {listed}{nearest(str(policy), policies)}"
        )
    try:
        entry = msgspec.convert(item, _Entry)
        kind = entry.kind or (url_kind(entry.url) if entry.url else None)
    except (ValueError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{where} = {mask(item)!r} is not allowed: {error}") from None
    if kind is None:
        raise ConfigError(f"{where} = {mask(item)!r} is not allowed: it needs 'kind' or 'url'")
    options = {key: value for key, value in item.items() if key not in _OWN}
    if entry.url is not None:
        options = _url_options(where, entry.url) | options
    return _checked(settings, where, kind, entry, options)


def _url_options(where: str, url: str) -> dict[str, Any]:
    """The options that a URL stands for: the URL itself, or the parts of one of a directory."""
    if url.partition("://")[0].lower() not in DIRECTORY_SCHEMES:
        return {"url": url}
    try:
        return directory_options(url)
    except ValueError as error:
        raise ConfigError(f"{where} = {mask(url)!r} is not allowed: {error}") from None


_OWN = frozenset(_Entry.__struct_fields__)


def _checked(settings: Settings, where: str, kind: str, entry: _Entry, options: dict[str, Any]) -> TierConfig:
    """A tier's configuration whose options its plug-in has accepted."""
    _check_plugin("tiers", "tier", where, kind)
    try:
        parse_codec(entry.codec)
    except ValueError as error:
        raise ConfigError(f"{where}: codec {entry.codec!r} is not allowed: {error}") from None
    options_type = plugins.load("tiers", kind).Options
    given = options
    general = {"timeout_seconds": settings.blocking_timeout_secs, "num_workers": settings.num_workers}
    options = general | options
    unknown = sorted(set(options) - set(options_type.__struct_fields__))
    if unknown:
        known = [*options_type.__struct_fields__, *_OWN]
        raise ConfigError(f"{where}: tier {kind!r} has no option {unknown[0]!r}{nearest(unknown[0], known)}")
    try:
        msgspec.convert(options, options_type)
    except msgspec.ValidationError as error:
        fault = str(error).replace("Object missing required field", "must have")
        raise ConfigError(f"{where}: options of tier {kind!r}: {fault}, in {mask(given)!r}") from None
    return TierConfig(
        kind=kind,
        name=entry.name or kind,
        codec=entry.codec,
        write_policy=entry.write_policy,
        options=options,
    )


def _check_plugin(group: plugins.Group, noun: str, where: str, name: str) -> None:
    known = plugins.names(group)
    if name not in known:
        listed = ", ".join(known)
        raise ConfigError(
            f"{where}: no {noun} {name!r} in this version{nearest(name, known)}; there is {listed}"
        )


def _named_apart(configs: list[TierConfig]) -> list[TierConfig]:
    """Each with a name of its own, in its options too: ``redis``, ``redis-2`` ..."""
    taken = {"l1"}
    named = []
    for config in configs:
        name, count = config.name, 1
        while name in taken:
            if config.name != config.kind:
                raise ConfigError(f"two tiers are named {name!r}")
            count += 1
            name = f"{config.kind}-{count}"
        taken.add(name)
        named.append(msgspec.structs.replace(config, name=name, options=config.options | {"name": name}))
    return named
