"""Settings -> a core: the pool, the index and the tiers, put together in one place."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence

import msgspec

from kvstrata import plugins
from kvstrata.cache.breaker import Breaker
from kvstrata.cache.cache import Cache
from kvstrata.cache.gate import Gate
from kvstrata.cache.index import Index
from kvstrata.cache.io import TierIO
from kvstrata.codecs.base import Codec
from kvstrata.codecs.open import Decoders, open_codec
from kvstrata.config import Settings, TierConfig, quota_configs, tier_configs
from kvstrata.errors import ConfigError, OperationError
from kvstrata.memory.pool import SlotAllocator
from kvstrata.memory.region import SharedRegion
from kvstrata.metrics import Metrics
from kvstrata.tiers.open import open_tier
from kvstrata.tracing import Tracer

logger = logging.getLogger(__name__)


def build_cache(
    settings: Settings, region: SharedRegion, metrics: Metrics, tracer: Tracer | None = None
) -> Cache:
    """A core over ``region``. Closing the cache closes the tiers, not the region and not the tracer.

    Raises:
        ConfigError: a tier, codec or policy cannot be had as configured.
    """
    policy = plugins.load("policies", settings.cache_policy.lower())()
    configs, codecs, decoders = check_tiers(settings)  # what can be refused first
    tiers: list[TierIO] = []
    for config, codec in zip(configs, codecs, strict=True):
        # Look-ups, reads and writes have a thread each, and no fewer connections than that.
        num_workers = max(3, int(config.options["num_workers"]))
        tier = open_tier(
            msgspec.structs.replace(config, options=config.options | {"num_workers": num_workers})
        )
        tiers.append(
            TierIO(
                tier,
                config.name,
                codec,
                decoders,
                metrics,
                num_workers=num_workers,
                write_queue_bytes=min(settings.write_queue_bytes, region.size_bytes // 2),
                write_policy=config.write_policy,
                breaker=Breaker(settings.breaker_failures),
                probe_seconds=settings.breaker_reset_seconds,
            )
        )
        logger.info("tier %s: %s", config.name, tier.describe())
    cache = Cache(
        region.view,
        uuid.uuid4().hex,
        Index(SlotAllocator(region.size_bytes), policy),
        tiers,
        metrics,
        gate=Gate(settings.gate),
        keep_in_l1=settings.local_cpu,
        read_fastest=settings.read_policy == "fastest",
        isolated=settings.isolation == "salt",
        lookup_timeout_seconds=settings.lookup_timeout_ms / 1000,
        tracer=tracer,
    )
    try:
        cache.quotas.put(*quota_configs(settings))
    except OperationError as error:
        cache.close()
        raise ConfigError(f"quotas: {error}") from None
    return cache


def check_tiers(settings: Settings) -> tuple[list[TierConfig], list[Codec], Decoders]:
    """The tiers that ``settings`` ask for, their codecs, and what decodes frames; before any of them is opened.

    Raises:
        ConfigError: together they make no core: keys are missing, or nothing could ever be held.
        PluginError: a codec cannot be loaded.
    """
    configs, options = tier_configs(settings), {"key_file": settings.encryption_key_file}
    # Keys for reading are read now: a file that cannot be used is found at start, and one that goes later changes
    # nothing.
    keyed = [] if settings.encryption_key_file is None else [open_codec("aesgcm", options)]
    _check_policies(settings, configs)
    codecs = [open_codec(config.codec, options) for config in configs]
    _check_encryption(settings, configs, codecs)
    return configs, codecs, Decoders(options, keyed, encrypted_only=settings.require_encryption)


def _check_encryption(settings: Settings, configs: Sequence[TierConfig], codecs: Sequence[Codec]) -> None:
    """Raises ConfigError where a tier would be written that could not be read."""
    for config, codec in zip(configs, codecs, strict=True):
        if settings.require_encryption and not codec.encrypts:
            raise ConfigError(
                f"require_encryption is set, but tier {config.name} is written with codec {config.codec!r}: "
                "set one that ends with aesgcm, such as floats+aesgcm (remote_serde for remote_url, codec for an "
                "item of tiers)"
            )


def _check_policies(settings: Settings, configs: Sequence[TierConfig]) -> None:
    """Raises ConfigError where nothing could ever be held."""
    if settings.local_cpu:
        return
    if not configs:
        raise ConfigError("local_cpu is false and there is no other tier (local_disk, remote_url, tiers)")
    if all(config.write_policy == "second_use" for config in configs):
        raise ConfigError(
            "local_cpu is false and every tier has write_policy second_use: nothing is kept until its second use; "
            "set local_cpu to true, or the write_policy of one tier to all"
        )
