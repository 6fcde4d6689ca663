"""Which stored prefixes are hit most. State that the core's lock guards, and a pure function over it.

A look-up adds one to a record of the place where its hit ended, however long its prompt is. What several such
places have in common, the system prompt of many conversations, is found when somebody asks.
"""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Iterable

import msgspec

from kvstrata.cache.lookups import Lookup
from kvstrata.types import Namespace, Piece

MAX_ENDS = 256
"""How many places are remembered, at least. One after 32,000 tokens takes about 30 kB, its pieces."""
_FORGOTTEN_AT_ONCE = 64
"""That many more may come before the least used are forgotten together: it takes about a millisecond."""


class End(msgspec.Struct):
    """Where hits ended."""

    namespace: Namespace
    pieces: tuple[Piece, ...]
    """All that was hit; the last one is the place."""
    num_hits: int = 0
    last_hit_at: float = 0.0
    """Unix seconds."""


class CommonPrefix(msgspec.Struct):
    """A prefix that hits had in common."""

    namespace: Namespace
    last_piece: Piece
    num_hits: int = 0
    """How many hits reached so far, or further."""
    last_hit_at: float = 0.0
    """Unix seconds."""

    @property
    def num_tokens(self) -> int:
        return self.last_piece.first_token + self.last_piece.num_tokens


class Popular:
    """A bounded count of where hits ended."""

    def __init__(self, *, isolated: bool = False) -> None:
        """``isolated``: what belongs to a salt is not counted."""
        self._isolated = isolated
        self._ends: dict[bytes, End] = {}

    def add(self, lookup: Lookup) -> None:
        """``lookup`` was answered."""
        pieces = lookup.hit.pieces if lookup.hit is not None else ()
        if not pieces or (self._isolated and lookup.prefix.salt_id):
            return
        end = self._ends.get(pieces[-1].chunk_hash)
        if end is None:
            end = self._ends[pieces[-1].chunk_hash] = End(lookup.namespace, pieces)
        elif len(pieces) > len(end.pieces):  # the first one's engine had the beginning itself
            end.pieces = pieces
        end.num_hits += 1
        end.last_hit_at = lookup.answered_at
        if len(self._ends) > MAX_ENDS + _FORGOTTEN_AT_ONCE:
            self._forget()

    def _forget(self) -> None:
        """Drop the least used. Their hits stay counted for a shorter prefix, where one is remembered."""
        least = heapq.nsmallest(
            _FORGOTTEN_AT_ONCE, self._ends.values(), key=lambda end: (end.num_hits, end.last_hit_at)
        )
        for end in least:
            del self._ends[end.pieces[-1].chunk_hash]
            shorter = (self._ends.get(piece.chunk_hash) for piece in reversed(end.pieces[:-1]))
            heir = next((found for found in shorter if found is not None), None)
            if heir is not None:
                heir.num_hits += end.num_hits
                heir.last_hit_at = max(heir.last_hit_at, end.last_hit_at)

    def ends(self) -> list[End]:
        """A copy of all that is remembered, in no order."""
        return [copy.copy(end) for end in self._ends.values()]


def common_prefixes(ends: Iterable[End]) -> list[CommonPrefix]:
    """The prefixes at which hits ended or parted, those that brought the most tokens first.

    Takes about a millisecond per thousand pieces.
    """
    ends = list(ends)
    hits: dict[bytes, int] = {}
    for end in ends:
        for piece in end.pieces:
            hits[piece.chunk_hash] = hits.get(piece.chunk_hash, 0) + end.num_hits
    found: dict[bytes, CommonPrefix] = {}
    for end in ends:
        for piece, following in itertools.pairwise(end.pieces):
            # One that was always hit with the same continuation says nothing that the continuation does not.
            if hits[piece.chunk_hash] != hits[following.chunk_hash]:
                _reached(found, end, piece)
        _reached(found, end, end.pieces[-1])
    for chunk_hash, prefix in found.items():
        prefix.num_hits = hits[chunk_hash]
    return sorted(found.values(), key=lambda prefix: prefix.num_hits * prefix.num_tokens, reverse=True)


def _reached(found: dict[bytes, CommonPrefix], end: End, piece: Piece) -> None:
    """A hit that went as far as ``end`` reached ``piece``."""
    prefix = found.get(piece.chunk_hash)
    if prefix is None:
        prefix = found[piece.chunk_hash] = CommonPrefix(end.namespace, piece)
    prefix.last_hit_at = max(prefix.last_hit_at, end.last_hit_at)
