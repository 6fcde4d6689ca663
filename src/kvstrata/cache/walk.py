"""Walks along a prefix: which pieces L1 holds, and which keys lower tiers could hold. Pure functions.

For a chunk position the candidates are the full chunk, then shorter tails at block boundaries, longest first;
for the last, partly filled block its exact remainder. A piece counts when all its shards are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from kvstrata.cache.index import Entry, Index, State
from kvstrata.types import HASH_BYTES, Namespace, Piece, Prefix


class Walk(msgspec.Struct):
    """How far L1 reaches along a prefix."""

    pieces: list[Piece]
    entries: list[list[Entry]]
    """``entries[piece][shard]``."""
    loading: list[Entry]
    """Entries that are being read and would extend the walk; empty when it ended for good."""
    first_block: int
    """Where it begins."""
    next_block: int
    """The block that it reaches, without it."""
    complete: bool
    """Whether all tokens of the prefix are covered."""

    @property
    def num_tokens(self) -> int:
        return self.pieces[-1].first_token + self.pieces[-1].num_tokens if self.pieces else 0


def _piece(namespace: Namespace, prefix: Prefix, start: int, end: int) -> Piece:
    """The full chunk or tail that covers blocks ``start .. end - 1``."""
    block_size = namespace.layout.block_size
    return Piece(
        chunk_hash=prefix.block_hash(end - 1),
        parent_hash=prefix.block_hash(start - 1),
        first_token=start * block_size,
        num_tokens=(end - start) * block_size,
    )


def _remainder(namespace: Namespace, prefix: Prefix) -> Piece:
    """The last, partly filled block."""
    first_token = prefix.num_blocks * namespace.layout.block_size
    return Piece(
        chunk_hash=prefix.remainder_hash,
        parent_hash=prefix.block_hash(prefix.num_blocks - 1),
        first_token=first_token,
        num_tokens=prefix.num_tokens - first_token,
    )


def position_candidates(namespace: Namespace, prefix: Prefix, start: int) -> Iterator[tuple[Piece, int]]:
    """The candidates of the chunk that starts at block ``start``, longest first, with the block each ends at."""
    for end in _candidate_ends(start, namespace.blocks_per_chunk, prefix.num_blocks):
        yield _piece(namespace, prefix, start, end), end


def _candidate_ends(start: int, per_chunk: int, num_blocks: int) -> range:
    """The blocks at which the candidates of a chunk end, the longest first."""
    return range(min(start + per_chunk, num_blocks), start, -1)


def walk(index: Index, namespace: Namespace, prefix: Prefix, first_token: int = 0, *, wait: bool) -> Walk:
    """How far L1 reaches along ``prefix``; with ``wait``, entries that are being read stop it for now.

    Where L1 does not reach ``first_token`` it begins anew with that token's chunk: who asks has what is before.
    """
    first_block = first_token // namespace.chunk_size * namespace.blocks_per_chunk
    result = Walk([], [], [], 0, 0, False)
    _extend(index, namespace, prefix, result, first_block, wait=False)
    if result.next_block < first_block:
        result = Walk([], [], [], first_block, first_block, False)
    _extend(index, namespace, prefix, result, prefix.num_blocks, wait=wait)
    if result.next_block == prefix.num_blocks and not result.loading:
        result.complete = not prefix.remainder_hash or _take(
            index, namespace, _remainder(namespace, prefix), result, wait=wait
        )
    return result


def _extend(
    index: Index, namespace: Namespace, prefix: Prefix, result: Walk, end_block: int, *, wait: bool
) -> None:
    """Go on with a walk, chunk by chunk, as far as L1 reaches or to ``end_block``."""
    per_chunk, num_blocks = namespace.blocks_per_chunk, prefix.num_blocks
    on_boundary = True
    while on_boundary and result.next_block < end_block:
        start = result.next_block
        for end in _candidate_ends(start, per_chunk, num_blocks):
            if _take(index, namespace, _piece(namespace, prefix, start, end), result, wait=wait):
                result.next_block = end
                break
            if result.loading:
                return
        on_boundary = result.next_block == start + per_chunk


def _take(index: Index, namespace: Namespace, piece: Piece, result: Walk, *, wait: bool) -> bool:
    """Append ``piece`` to the walk when all its shards are READY; note shards that are being read."""
    shards = []
    loading = []
    for shard in range(namespace.world_size):
        entry = index.get(piece.chunk_hash, shard)
        if entry is None or entry.state is State.WRITING or not fits(entry, piece, namespace):
            return False
        if entry.state is State.LOADING:
            loading.append(entry)
        shards.append(entry)
    if loading:
        if wait:
            result.loading = loading
        return False
    result.pieces.append(piece)
    result.entries.append(shards)
    return True


def fits(entry: Entry, piece: Piece, namespace: Namespace) -> bool:
    """Whether an entry is what the chain says. The hash covers all of it, so this never fails in practice.

    Namespaces are interned by ``cache.Cache``, hence identity.
    """
    return (
        entry.num_tokens == piece.num_tokens
        and entry.first_token == piece.first_token
        and entry.namespace is namespace
    )


class Candidates:
    """What lower tiers could add to a walk that ended at a block: for each block after it the full chunk or tail
    that ends there, then the remainder.

    Pieces are made on demand: a prompt of 32,000 tokens has 2,000, which take 3 ms, and few of them matter.
    """

    __slots__ = ("_first_block", "_namespace", "_prefix")

    def __init__(self, namespace: Namespace, prefix: Prefix, first_block: int) -> None:
        self._namespace = namespace
        self._prefix = prefix
        self._first_block = first_block

    def __len__(self) -> int:
        return self._prefix.num_blocks - self._first_block + bool(self._prefix.remainder_hash)

    @property
    def num_shards(self) -> int:
        """Shards of each."""
        return self._namespace.world_size

    def hashes(self) -> list[bytes]:
        """Their chunk hashes."""
        rest = self._hashes()
        return [rest[at : at + HASH_BYTES] for at in range(0, len(rest), HASH_BYTES)]

    def keys(self, numbers: Iterable[int]) -> list[str]:
        """The keys of the shards of some of them: those of the first, of the second, and so on."""
        heads = [f"{self._namespace.key_prefix}{shard}@" for shard in range(self._namespace.world_size)]
        digits = self._hashes().hex()
        step = 2 * HASH_BYTES
        return [head + digits[at * step : (at + 1) * step] for at in numbers for head in heads]

    def chunk_ends(self) -> range:
        """Those that end a whole chunk."""
        per_chunk = self._namespace.blocks_per_chunk
        first = per_chunk - 1 - self._first_block % per_chunk
        return range(first, self._prefix.num_blocks - self._first_block, per_chunk)

    def _hashes(self) -> bytes:
        return self._prefix.block_hashes[self._first_block * HASH_BYTES :] + self._prefix.remainder_hash

    def position(self, piece: Piece) -> int | None:
        """Where ``piece`` of the same prefix is among them; None when it ends before the first of them."""
        if piece.chunk_hash == self._prefix.remainder_hash:
            return len(self) - 1
        end = (piece.first_token + piece.num_tokens) // self._namespace.layout.block_size
        return end - 1 - self._first_block if end > self._first_block else None


def first_missing(namespace: Namespace, prefix: Prefix, first_block: int) -> Piece | None:
    """The longest piece that could continue a walk that ended at ``first_block``."""
    per_chunk = namespace.blocks_per_chunk
    start = first_block // per_chunk * per_chunk
    for piece, end in position_candidates(namespace, prefix, start):
        if end > first_block:
            return piece
    return _remainder(namespace, prefix) if prefix.remainder_hash else None


def best_cover(
    namespace: Namespace, prefix: Prefix, first_block: int, is_held: Callable[[Piece], bool]
) -> list[Piece]:
    """The pieces that extend a walk that ended at ``first_block``, of those that are held.

    Follows the same order as :func:`walk`, so that the next walk takes what is now read.
    """
    per_chunk = namespace.blocks_per_chunk
    pieces = []
    block = first_block
    start = first_block // per_chunk * per_chunk
    while start < prefix.num_blocks:
        for piece, end in position_candidates(namespace, prefix, start):
            if end > block and is_held(piece):
                pieces.append(piece)
                block = end
                break
        start += per_chunk
        if block != start:
            break
    if block == prefix.num_blocks and prefix.remainder_hash:
        remainder = _remainder(namespace, prefix)
        if is_held(remainder):
            pieces.append(remainder)
    return pieces
