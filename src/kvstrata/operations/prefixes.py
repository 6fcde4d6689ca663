"""The stored prefixes that are hit most."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.cache.cache import Cache
from kvstrata.cache.index import State
from kvstrata.cache.popular import CommonPrefix
from kvstrata.metrics import L1
from kvstrata.operations.report import Report


@dataclass(frozen=True)
class PrefixReport(Report):
    """A prefix that look-ups hit, as a whole or as the beginning of more."""

    key: str
    """Of its last entry; of shard 0 where there are several."""
    model_name: str
    num_tokens: int
    """How long it is."""
    num_hits: int
    """How many look-ups hit it. Some hundred places where hits ended are remembered; the hits of those that were
    forgotten count for a shorter prefix, where one is remembered."""
    last_hit_at: float
    """Unix seconds."""
    held_in: list[str]
    """Where its last entry is now, as far as L1 knows: empty when it has left L1."""


def report_prefixes(cache: Cache, limit: int) -> list[PrefixReport]:
    """Up to ``limit``, those that brought the most tokens first."""
    prefixes = cache.popular()[:limit]
    with cache.guarded() as index:
        entries = [index.get(prefix.last_piece.chunk_hash, 0) for prefix in prefixes]
        masks = [
            entry.tiers if entry is not None and entry.state is State.READY else None for entry in entries
        ]
    return [_report(cache, prefix, mask) for prefix, mask in zip(prefixes, masks, strict=True)]


def _report(cache: Cache, prefix: CommonPrefix, tiers_mask: int | None) -> PrefixReport:
    held_in = []
    if tiers_mask is not None:
        held_in = [L1, *(tier.name for i, tier in enumerate(cache.tiers) if tiers_mask & (1 << i))]
    return PrefixReport(
        key=prefix.namespace.key(prefix.last_piece.chunk_hash, 0),
        model_name=prefix.namespace.model_name,
        num_tokens=prefix.num_tokens,
        num_hits=prefix.num_hits,
        last_hit_at=prefix.last_hit_at,
        held_in=held_in,
    )
