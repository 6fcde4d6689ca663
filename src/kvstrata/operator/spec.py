"""What a Model says. The CustomResourceDefinition checks types; this checks again, and what goes together."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from kvstrata.config import mask, tier_from_url
from kvstrata.errors import KVStrataError
from kvstrata.operator.options import PASSWORD, Options

TRANSFER_CONFIG = "--kv-transfer-config"


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
        raise SpecError(f"spec: {error}".replace("`$.", "`spec.")) from None
    if not (model.image or options.image):
        raise SpecError(
            "spec.image: name an image with vLLM and the connector, or set the operator's modelImage"
        )
    if model.kv_cache.enabled and any(each.split("=")[0] == TRANSFER_CONFIG for each in model.args):
        raise SpecError(f"spec.args: {TRANSFER_CONFIG} is set by kvCache.enabled; remove one of the two")
    if model.kv_cache.remote_url:
        try:
            tier_from_url(model.kv_cache.remote_url)
        except KVStrataError as error:
            raise SpecError(f"spec.kvCache.remoteUrl={mask(model.kv_cache.remote_url)}: {error}") from None
        if PASSWORD in model.kv_cache.remote_url and not options.redis_secret:
            raise SpecError(f"spec.kvCache.remoteUrl has {PASSWORD}, but the operator knows no Secret for it")
    return model
