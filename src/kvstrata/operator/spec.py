"""What a Model says. The CustomResourceDefinition checks types; this checks again, and what goes together."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from kvstrata.config import SETTINGS, mask, tier_from_url
from kvstrata.config.nearest import nearest
from kvstrata.config.values import parse
from kvstrata.errors import ConfigError, KVStrataError, PluginError
from kvstrata.operator.options import PASSWORD, Options
from kvstrata.operator.quantities import parse_quantity

TRANSFER_CONFIG = "--kv-transfer-config"
_OWN_ARGUMENTS = {
    "--model": "spec.modelName",
    "--tensor-parallel-size": "spec.tensorParallelSize",
    "-tp": "spec.tensorParallelSize",
    "--port": "the operator (its probes and its Service lead there)",
}
CACHE_ENV = frozenset({"REDIS_PASSWORD", "KVSTRATA_TTL_SECONDS"}) | {
    f"LMCACHE_{name}"
    for name in (
        "USE_EXPERIMENTAL", "CHUNK_SIZE", "LOCAL_CPU", "MAX_LOCAL_CPU_SIZE", "REMOTE_URL", "REMOTE_SERDE",
    )
}  # fmt: skip
"""Variables that ``kvCache`` sets."""
_GPU = "nvidia.com/gpu"
_GIB = 1 << 30


class SpecError(KVStrataError):
    """A Model cannot be served as it is; the message names the field and what to do."""


class KVCacheSpec(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """``spec.kvCache``."""

    enabled: bool = False
    chunk_size: Annotated[int, Meta(ge=1, le=1_048_576)] = 256
    """Tokens."""
    local_cpu_gb: Annotated[float, Meta(ge=0, le=1_048_576)] = 0
    """GiB of host memory of each replica; 0: the shared tier only."""
    remote_url: str = ""
    serde: str = "naive"
    ttl_seconds: Annotated[int, Meta(ge=1)] | None = None


class ModelSpec(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """``spec`` of a Model."""

    model_name: Annotated[str, Meta(min_length=1)]
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=1024)] = 1
    replicas: Annotated[int, Meta(ge=0)] = 1
    image: str = ""
    resources: dict[str, Any] = {}
    args: list[str] = []
    env: list[dict[str, Any]] = []
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    kv_cache: KVCacheSpec = field(default_factory=KVCacheSpec)


def parse_spec(spec: dict[str, Any], options: Options) -> ModelSpec:
    """Read ``spec`` of a Model.

    Raises:
        SpecError: a field is missing, unknown or wrong, or does not go with another.
    """
    try:
        model = msgspec.convert(spec, ModelSpec, strict=False)
    except msgspec.ValidationError as error:
        raise SpecError(f"spec: {error}{_suggestion(str(error))}".replace("`$.", "`spec.")) from None
    if not (model.image or options.image):
        raise SpecError(
            "spec.image: name an image with vLLM and the connector, or set the operator's modelImage"
        )
    _check_arguments(model)
    _check_env(model)
    _check_resources(model)
    _check_serde(model.kv_cache.serde)
    if model.kv_cache.remote_url:
        try:
            tier_from_url(model.kv_cache.remote_url)
        except KVStrataError as error:
            raise SpecError(f"spec.kvCache.remoteUrl={mask(model.kv_cache.remote_url)}: {error}") from None
        if PASSWORD in model.kv_cache.remote_url and not options.redis_secret:
            raise SpecError(f"spec.kvCache.remoteUrl has {PASSWORD}, but the operator knows no Secret for it")
    return model


def _suggestion(message: str) -> str:
    """The field that was probably meant, where one is unknown."""
    unknown = re.search("unknown field `(.*?)`", message)
    known = (KVCacheSpec if "kvCache`" in message else ModelSpec).__struct_encode_fields__
    return nearest(unknown[1], known) if unknown else ""


def _check_arguments(model: ModelSpec) -> None:
    for argument in (each.split("=")[0].replace("_", "-") for each in model.args):
        if argument in _OWN_ARGUMENTS:
            raise SpecError(
                f"spec.args: {argument} is set by {_OWN_ARGUMENTS[argument]}; remove it from spec.args"
            )
        if model.kv_cache.enabled and argument == TRANSFER_CONFIG:
            raise SpecError(f"spec.args: {TRANSFER_CONFIG} is set by kvCache.enabled; remove one of the two")


def _check_env(model: ModelSpec) -> None:
    """A name that stands twice would make Kubernetes refuse the Deployment."""
    names = {"HOME": "the operator"}
    for index, item in enumerate(model.env):
        name = item.get("name")
        if not isinstance(name, str) or not name:
            raise SpecError(f"spec.env[{index}] has no name")
        by = "kvCache" if model.kv_cache.enabled and name in CACHE_ENV else names.get(name)
        if by is not None:
            raise SpecError(f"spec.env[{index}]: {name} is set by {by}; remove it")
        names[name] = "an item before it"


def _check_resources(model: ModelSpec) -> None:
    """Sizes that cannot be, so that no pod is made which is ended by the kernel again and again."""
    _quantities(model, "requests")
    limits = _quantities(model, "limits")
    cache_gib = model.kv_cache.local_cpu_gb if model.kv_cache.enabled else 0
    if 0 < cache_gib * _GIB >= limits.get("memory", math.inf):
        raise SpecError(
            f"spec.kvCache.localCpuGb={cache_gib:g} does not fit into spec.resources.limits.memory="
            f"{model.resources['limits']['memory']}, and vLLM wants memory besides: raise the limit"
        )
    ranks = model.tensor_parallel_size
    if limits.get(_GPU, math.inf) < ranks:
        raise SpecError(
            f"spec.resources.limits.{_GPU} is less than spec.tensorParallelSize={ranks}: a GPU per rank"
        )


def _quantities(model: ModelSpec, kind: str) -> dict[str, float]:
    given = model.resources.get(kind, {})
    if not isinstance(given, dict):
        raise SpecError(f"spec.resources.{kind}: expected an object, got {given!r}")
    found: dict[str, float] = {}
    for name, value in given.items():
        try:
            found[name] = parse_quantity(value)
        except ValueError as error:
            raise SpecError(f"spec.resources.{kind}.{name}: {error}") from None
    return found


def _check_serde(serde: str) -> None:
    """The engine would refuse to start with a codec that does not exist."""
    try:
        parse(SETTINGS["remote_serde"], serde, "spec.kvCache.serde")
    except PluginError:
        return  # known, and its library is not in the operator's image; the engine's may have it
    except ConfigError as error:
        raise SpecError(f"spec.kvCache.serde: {error}") from None
