"""Why a request hit what it hit: an answered lookup, token range by token range. Pure functions.

Only what the lookup has noted is used, so that explaining costs its requests nothing; what L1 holds by now would
mislead, as the request itself has stored what it missed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from kvstrata.cache.gate import Decision, Verdict
from kvstrata.cache.index import Entry, State
from kvstrata.cache.lookups import Lookup
from kvstrata.cache.walk import position_candidates
from kvstrata.frame import HEADER_BYTES, tokens_hash_in
from kvstrata.metrics import L1
from kvstrata.types import MissReason, Piece

_MAX_OTHERS = 10


class TokenRange(msgspec.Struct, frozen=True):
    """Tokens of a prompt that fared alike."""

    first_token: int
    num_tokens: int
    state: Literal["hit", "miss", "engine"]
    """``engine``: the inference engine said that it has them itself; nobody looked."""
    tier: str | None = None
    """Where a hit came from."""
    reason: MissReason | None = None
    """Why it is a miss."""
    held_by: tuple[str, ...] = ()
    """Tiers that said to hold what is missing."""


class OtherHolding(msgspec.Struct, frozen=True):
    """An entry of L1 with the same tokens as the first that were missing, under another key."""

    key: str
    first_token: int
    differs_in: tuple[str, ...]
    """``salt``, ``prefix`` (what is before them), or fields of the namespace (``layout`` ...)."""


class Explanation(msgspec.Struct, frozen=True):
    """One answered lookup."""

    request_id: str
    answered_at: float
    """Unix seconds."""
    seconds: float
    """From the first question to the answer."""
    model_name: str
    num_tokens: int
    num_hit_tokens: int
    """The nearest stored prefix ends here."""
    reason: MissReason | None
    """Why it ended there; None after a full hit."""
    detail: str
    """The same in a sentence."""
    ranges: tuple[TokenRange, ...]
    decisions: tuple[Decision, ...]
    """What the gate said to loading, with its estimates."""
    load_seconds: dict[str, float]
    """By tier, what its loads took."""
    same_tokens: tuple[OtherHolding, ...] = ()
    """Where else L1 holds the first tokens that were missing; known once they have been stored."""


def explain(lookup: Lookup, tier_names: Sequence[str]) -> Explanation:
    """The explanation of a lookup that was answered."""
    hit = lookup.hit
    assert hit is not None  # noqa: S101  only answered ones are kept
    ranges = tuple(_merged(itertools.chain(_covered(lookup), _missing(lookup, tier_names))))
    return Explanation(
        request_id=lookup.request_id,
        answered_at=lookup.answered_at,
        seconds=lookup.seconds,
        model_name=lookup.namespace.model_name,
        num_tokens=lookup.prefix.num_tokens,
        num_hit_tokens=hit.num_tokens,
        reason=hit.miss_reason,
        detail=_detail(lookup, hit.miss_reason, tier_names),
        ranges=ranges,
        decisions=tuple(lookup.decisions),
        load_seconds=dict(lookup.load_seconds),
    )


def first_missing_pieces(lookup: Lookup) -> list[Piece]:
    """The pieces that could have followed the hit, the longest first."""
    start = _reached(lookup) // lookup.namespace.chunk_size * lookup.namespace.blocks_per_chunk
    return [piece for piece, _ in position_candidates(lookup.namespace, lookup.prefix, start)]


def _reached(lookup: Lookup) -> int:
    """The first token that was neither hit nor the engine's own."""
    assert lookup.hit is not None  # noqa: S101
    return max(lookup.hit.num_tokens, lookup.first_block * lookup.namespace.layout.block_size)


def _covered(lookup: Lookup) -> Iterator[TokenRange]:
    assert lookup.hit is not None  # noqa: S101
    if lookup.first_block:
        yield TokenRange(0, lookup.first_block * lookup.namespace.layout.block_size, "engine")
    for piece in lookup.hit.pieces:
        yield TokenRange(piece.first_token, piece.num_tokens, "hit", tier=lookup.source(piece))


def _missing(lookup: Lookup, tier_names: Sequence[str]) -> Iterator[TokenRange]:
    """What is after the hit, chunk by chunk, with the tiers that said to hold it."""
    namespace, prefix = lookup.namespace, lookup.prefix
    assert lookup.hit is not None  # noqa: S101
    reason, reached = lookup.hit.miss_reason, _reached(lookup)
    for start in range(reached // namespace.chunk_size * namespace.blocks_per_chunk, prefix.num_blocks,
                       namespace.blocks_per_chunk):  # fmt: skip
        piece, end_block = next(position_candidates(namespace, prefix, start))
        first, end = max(reached, piece.first_token), end_block * namespace.layout.block_size
        if end > first:
            yield TokenRange(
                first, end - first, "miss", reason=reason, held_by=_holders(lookup, piece, tier_names)
            )
            reached = end
    if prefix.num_tokens > reached:
        yield TokenRange(reached, prefix.num_tokens - reached, "miss", reason=reason)


def _holders(lookup: Lookup, piece: Piece, tier_names: Sequence[str]) -> tuple[str, ...]:
    """The tiers that said to hold all of a piece."""
    position = lookup.candidates.position(piece)
    if position is None:
        return ()
    shards = range(lookup.namespace.world_size)
    masks = [lookup.tiers_holding(position, shard) for shard in shards]
    return tuple(name for i, name in enumerate(tier_names) if all(mask & (1 << i) for mask in masks))


def _merged(ranges: Iterator[TokenRange]) -> Iterator[TokenRange]:
    """Neighbours that fared alike as one."""
    for _, group in itertools.groupby(ranges, lambda r: (r.state, r.tier, r.reason, r.held_by)):
        first, *others = group
        yield msgspec.structs.replace(first, num_tokens=first.num_tokens + sum(r.num_tokens for r in others))


def _detail(lookup: Lookup, reason: MissReason | None, tier_names: Sequence[str]) -> str:
    silent = [name for i, name in enumerate(tier_names) if lookup.probed and i not in lookup.held_by_tier]
    match reason:
        case None:
            return "all of it is held"
        case MissReason.ABSENT:
            asked = ", ".join([L1, *(name for name in tier_names if lookup.probed and name not in silent)])
            return (
                f"the nearest stored prefix ends at token {_reached(lookup)}; what follows is not in {asked}"
            )
        case MissReason.EVICTED:
            return f"what follows token {_reached(lookup)} was in l1 and was evicted; no tier has it"
        case MissReason.SALT_QUOTA:
            return (
                f"what follows token {_reached(lookup)} went, or was not stored: the quota of its cache_salt, or "
                "what is reserved for others, left no room"
            )
        case MissReason.CHUNK_ALIGNMENT:
            return (
                f"what is stored after token {_reached(lookup)} is in chunks that end later, or in other words, "
                "than this prompt; a chunk is found as a whole only"
            )
        case MissReason.TIER_DOWN:
            return f"down, or it failed: {', '.join(silent) or 'a tier, while it was read'}"
        case MissReason.DEADLINE:
            return f"at the look-up's deadline had not answered or delivered: {', '.join(silent) or 'a load'}"
        case MissReason.GATED if any(d.verdict is Verdict.RECOMPUTE for d in lookup.decisions):
            return "loading it is slower than computing it (see the decisions)"
        case MissReason.GATED:
            return "loading it took longer than it was worth waiting for, and was given up"
        case MissReason.NO_SPACE:
            return (
                "l1 had no room to load it, as all of it is in use, or the process had no memory to decode it"
            )
        case _:
            return f"a tier could not deliver what it holds: {reason.value}"


def others_with_tokens(
    pool: memoryview, stored: Entry, entries: Sequence[Entry], *, same_salt: bool
) -> tuple[OtherHolding, ...]:
    """Those of ``entries`` that hold the same tokens as ``stored`` under another key, a few of them; with
    ``same_salt`` none of other salts.

    Reads headers in slots without the lock: what is freed meanwhile is left out afterwards.
    """
    wanted = tokens_hash_in(pool[stored.offset : stored.offset + HEADER_BYTES])
    if not any(wanted):
        return ()
    same = (
        entry
        for entry in entries
        if entry.num_tokens == stored.num_tokens
        and entry.shard == stored.shard
        and entry.key != stored.key
        and not (same_salt and entry.salt_id != stored.salt_id)
        and tokens_hash_in(pool[entry.offset : entry.offset + HEADER_BYTES]) == wanted
        and entry.state is State.READY
    )
    return tuple(
        OtherHolding(
            entry.namespace.key(entry.chunk_hash, entry.shard), entry.first_token, _differs(stored, entry)
        )
        for entry in itertools.islice(same, _MAX_OTHERS)
    )


def _differs(stored: Entry, other: Entry) -> tuple[str, ...]:
    if other.namespace is not stored.namespace:
        fields = stored.namespace.__struct_fields__
        return tuple(f for f in fields if getattr(stored.namespace, f) != getattr(other.namespace, f))
    return ("salt",) if stored.salt_id != other.salt_id else ("prefix",)
