"""What a lookup reads from which tier, once the tiers have said what they hold. State changes only, no I/O;
``cache.Cache`` holds its lock around all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstrata.cache.gate import Decision, Gate, Verdict
from kvstrata.cache.index import Entry, Index, State
from kvstrata.cache.lookups import Lookup
from kvstrata.cache.walk import best_cover, fits, walk
from kvstrata.types import MissReason, Piece


class PlannedPiece(msgspec.Struct, frozen=True, eq=False):
    """A piece that extends what L1 holds of a prefix."""

    piece: Piece
    reads: dict[int, int]
    """For each shard that L1 lacks, the tier to read it from."""
    position: int
    """Where it is among the lookup's candidates."""


class Read(msgspec.Struct, frozen=True, eq=False):
    """One shard to be read from a tier into its entry's slot."""

    tier: int
    piece: Piece
    entry: Entry


def plan_pieces(index: Index, lookup: Lookup) -> list[PlannedPiece]:
    """The pieces that continue the walk along the lookup's prefix, taking L1 and the tiers together."""
    planned: dict[bytes, PlannedPiece] = {}

    def is_held(piece: Piece) -> bool:
        position = lookup.candidates.position(piece)
        reads = None if position is None else _reads(index, lookup, position, piece)
        if position is None or reads is None:
            return False
        planned[piece.chunk_hash] = PlannedPiece(piece, reads, position)
        return True

    reached = walk(index, lookup.namespace, lookup.prefix, lookup.first_token, wait=False)
    cover = best_cover(lookup.namespace, lookup.prefix, reached.next_block, is_held)
    return [planned[piece.chunk_hash] for piece in cover]


def _reads(index: Index, lookup: Lookup, position: int, piece: Piece) -> dict[int, int] | None:
    """What is to be read of a candidate; None when one of its shards is nowhere."""
    reads: dict[int, int] = {}
    for shard in range(lookup.namespace.world_size):
        tier = lookup.tier_holding(position, shard)
        entry = index.get(piece.chunk_hash, shard)
        if entry is not None and entry.state in {State.READY, State.LOADING}:
            if not fits(entry, piece, lookup.namespace):
                return None
        elif tier is None:
            return None
        else:
            reads[shard] = tier
    return reads


def is_complete(plan: list[PlannedPiece], lookup: Lookup) -> bool:
    """Whether ``plan`` reaches the end of the lookup's prefix."""
    return bool(plan) and plan[-1].piece.first_token + plan[-1].piece.num_tokens == lookup.prefix.num_tokens


def worth_loading(
    plan: list[PlannedPiece], lookup: Lookup, gate: Gate, tier_names: Sequence[str], now: float
) -> tuple[list[PlannedPiece], list[Decision]]:
    """The leading part of ``plan`` that the gate lets through, and what it decided for each tier on the way."""
    num_tokens: dict[int, int] = {}
    num_bytes: dict[int, int] = {}
    for planned in plan:
        for tier in set(planned.reads.values()):
            num_tokens[tier] = num_tokens.get(tier, 0) + planned.piece.num_tokens
        for tier in planned.reads.values():
            size = lookup.namespace.layout.payload_bytes(planned.piece.num_tokens)
            num_bytes[tier] = num_bytes.get(tier, 0) + size
    fingerprint = lookup.namespace.fingerprint
    decisions: dict[int, Decision] = {}
    for end, planned in enumerate(plan):
        for tier in planned.reads.values():
            if tier not in decisions:
                name = tier_names[tier]
                decisions[tier] = gate.decide(fingerprint, name, num_tokens[tier], num_bytes[tier], now)
            if decisions[tier].verdict is Verdict.RECOMPUTE:
                return plan[:end], list(decisions.values())
    return plan, list(decisions.values())


def hold(
    index: Index, lookup: Lookup, plan: list[PlannedPiece], tier_names: Sequence[str]
) -> tuple[list[Read], MissReason | None]:
    """Lease what L1 holds of ``plan`` and give the rest slots; what is to be read, and why there was no room for
    more."""
    for planned in plan:
        for shard in range(lookup.namespace.world_size):
            entry = index.get(planned.piece.chunk_hash, shard)
            if entry is not None:
                lookup.lease(entry)
    reads: list[Read] = []
    for planned in plan:
        for shard, tier in planned.reads.items():
            entry = index.get(planned.piece.chunk_hash, shard)
            if entry is None:
                salt_id = lookup.prefix.salt_id
                entry = index.insert(lookup.namespace, planned.piece, shard, State.LOADING, salt_id=salt_id)
                if entry is None:
                    return reads, _why_no_room(index, planned.piece, shard)
                entry.tiers = lookup.tiers_holding(planned.position, shard)
                reads.append(Read(tier, planned.piece, entry))
                lookup.lease(entry)
            if entry.state is State.LOADING:
                lookup.fetched[entry.key] = tier_names[tier]
    return reads, None


def _why_no_room(index: Index, piece: Piece, shard: int) -> MissReason:
    reason = index.why_missing(piece.chunk_hash, shard)
    return reason if reason is MissReason.SALT_QUOTA else MissReason.NO_SPACE
