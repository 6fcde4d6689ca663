"""Walks and covers against a brute force."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from kvstrata.cache.index import Index, State
from kvstrata.cache.walk import Candidates, best_cover, first_missing, position_candidates, walk
from kvstrata.hashing import PrefixHasher
from kvstrata.memory.pool import SlotAllocator
from kvstrata.policies.lru import LRUPolicy
from kvstrata.types import KVLayout, Namespace, Piece, Prefix

BLOCK_SIZE = 4
LAYOUT = KVLayout(block_size=BLOCK_SIZE, page_bytes=(64,), dtype="bfloat16", kernel_format="test")


def make_namespace(blocks_per_chunk: int, world_size: int) -> Namespace:
    chunk_size = blocks_per_chunk * BLOCK_SIZE
    return Namespace("vllm", "m", "fp", "auto", world_size, f"tp{world_size}", chunk_size, LAYOUT)


def make_prefix(namespace: Namespace, num_tokens: int, seed: int = 0) -> Prefix:
    tokens = [random.Random(f"{seed} {i}").randrange(1000) for i in range(num_tokens)]
    hasher = PrefixHasher(namespace)
    hasher.extend(tokens)
    return hasher.prefix(tokens)


def every_piece(namespace: Namespace, prefix: Prefix) -> list[Piece]:
    """All pieces that can be stored of a prefix, in the order of their beginnings, longest first."""
    starts = range(0, prefix.num_blocks, namespace.blocks_per_chunk)
    pieces = [piece for start in starts for piece, _ in position_candidates(namespace, prefix, start)]
    if prefix.remainder_hash:
        parent, first_token = prefix.block_hash(prefix.num_blocks - 1), prefix.num_blocks * BLOCK_SIZE
        pieces.append(Piece(prefix.remainder_hash, parent, first_token, prefix.num_tokens - first_token))
    return pieces


def make_index() -> Index:
    return Index(SlotAllocator(16 << 20), LRUPolicy())


def insert(index: Index, namespace: Namespace, piece: Piece, shard: int, state: State = State.READY) -> None:
    if index.get(piece.chunk_hash, shard) is None:
        entry = index.insert(namespace, piece, shard, state)
        assert entry is not None
        index.unlease(entry)


def longest_chain(namespace: Namespace, prefix: Prefix, held: set[bytes]) -> int:
    """By trying every way to put pieces of ``held`` one after another: how many tokens can be covered."""
    chunk_size = namespace.chunk_size

    def ends(start: int) -> Iterator[int]:
        yield start
        for piece in every_piece(namespace, prefix):
            if piece.first_token != start or piece.chunk_hash not in held:
                continue
            end = start + piece.num_tokens
            is_remainder = piece.chunk_hash == prefix.remainder_hash
            if is_remainder or start % chunk_size == 0:
                yield from ends(end)

    return max(ends(0))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Namespace, Prefix, list[Piece], random.Random]:
    namespace = make_namespace(draw(st.integers(1, 4)), draw(st.integers(1, 2)))
    prefix = make_prefix(namespace, draw(st.integers(0, 4 * 4 * BLOCK_SIZE + 3)))
    return namespace, prefix, every_piece(namespace, prefix), draw(st.randoms(use_true_random=False))


@given(cases(), st.floats(0.2, 1))
def test_a_walk_reaches_as_far_as_any_chain(
    case: tuple[Namespace, Prefix, list[Piece], random.Random], density: float
) -> None:
    namespace, prefix, pieces, rng = case
    index = make_index()
    held: set[bytes] = set()
    for piece in pieces:
        shards = [shard for shard in range(namespace.world_size) if rng.random() < density]
        for shard in shards:
            insert(index, namespace, piece, shard)
        if len(shards) == namespace.world_size:
            held.add(piece.chunk_hash)
    reached = walk(index, namespace, prefix, wait=True)
    assert reached.num_tokens == longest_chain(namespace, prefix, held)
    assert reached.complete == (reached.num_tokens == prefix.num_tokens)
    assert reached.loading == []
    position = 0
    for piece, entries in zip(reached.pieces, reached.entries, strict=True):
        assert piece.first_token == position
        position += piece.num_tokens
        assert [entry.shard for entry in entries] == list(range(namespace.world_size))
        assert {entry.chunk_hash for entry in entries} == {piece.chunk_hash}


@given(cases(), st.floats(0, 1), st.floats(0, 1))
def test_a_cover_and_the_next_walk_reach_as_far_as_any_chain(
    case: tuple[Namespace, Prefix, list[Piece], random.Random], in_l1: float, in_tiers: float
) -> None:
    namespace, prefix, pieces, rng = case
    index = make_index()
    first = {piece.chunk_hash for piece in pieces if rng.random() < in_l1}
    second = {piece.chunk_hash for piece in pieces if rng.random() < in_tiers}
    for piece in pieces:
        if piece.chunk_hash in first:
            for shard in range(namespace.world_size):
                insert(index, namespace, piece, shard)
    reached = walk(index, namespace, prefix, wait=False)
    candidates = Candidates(namespace, prefix, reached.next_block)
    held = first | second
    cover = best_cover(namespace, prefix, reached.next_block, lambda piece: piece.chunk_hash in held)
    for piece in cover:
        assert candidates.position(piece) is not None
        for shard in range(namespace.world_size):
            insert(index, namespace, piece, shard)
    after = walk(index, namespace, prefix, wait=False)
    assert after.num_tokens == longest_chain(namespace, prefix, first | second)


@given(cases())
def test_what_is_missing_is_asked_for_once_and_in_order(
    case: tuple[Namespace, Prefix, list[Piece], random.Random],
) -> None:
    namespace, prefix, pieces, rng = case
    assert len({piece.chunk_hash for piece in pieces}) == len(pieces)
    starts = [piece.first_token for piece in pieces]
    assert starts == sorted(starts)
    first_block = rng.randint(0, prefix.num_blocks)
    candidates = Candidates(namespace, prefix, first_block)
    keys, shards = candidates.keys(range(len(candidates))), range(namespace.world_size)
    positions = set()
    for piece in pieces:
        position = candidates.position(piece)
        assert (position is None) == (piece.first_token + piece.num_tokens <= first_block * BLOCK_SIZE)
        if position is not None:
            positions.add(position)
            expected = [namespace.key(piece.chunk_hash, shard) for shard in shards]
            assert keys[position * len(shards) : (position + 1) * len(shards)] == expected
    assert positions == set(range(len(candidates)))
    assert len(keys) == len(candidates) * len(shards)
    assert {piece.chunk_hash for piece in pieces if candidates.position(piece) is not None} == set(
        candidates.hashes()
    )
    missing = [piece for piece in pieces if candidates.position(piece) is not None]
    assert first_missing(namespace, prefix, first_block) == (missing[0] if missing else None)


def test_what_is_being_read_stops_a_walk_that_waits() -> None:
    namespace = make_namespace(2, 2)
    prefix = make_prefix(namespace, 6 * BLOCK_SIZE)
    index = make_index()
    chunks = [next(position_candidates(namespace, prefix, start))[0] for start in (0, 2, 4)]
    for chunk in chunks:
        insert(index, namespace, chunk, 0)
    insert(index, namespace, chunks[0], 1)
    insert(index, namespace, chunks[1], 1, State.LOADING)
    insert(index, namespace, chunks[2], 1)
    waiting = walk(index, namespace, prefix, wait=True)
    assert (waiting.num_tokens, [entry.shard for entry in waiting.loading]) == (8, [1])
    assert walk(index, namespace, prefix, wait=False).num_tokens == 8
    entry = index.get(chunks[1].chunk_hash, 1)
    assert entry is not None
    entry.state = State.READY
    assert walk(index, namespace, prefix, wait=True).complete


def test_a_shard_being_read_is_not_waited_for_when_another_is_missing() -> None:
    namespace = make_namespace(1, 2)
    prefix = make_prefix(namespace, BLOCK_SIZE)
    index = make_index()
    (chunk,) = every_piece(namespace, prefix)
    insert(index, namespace, chunk, 0, State.LOADING)
    assert walk(index, namespace, prefix, wait=True).loading == []


def test_what_is_being_written_is_not_seen() -> None:
    namespace = make_namespace(1, 1)
    prefix = make_prefix(namespace, BLOCK_SIZE)
    index = make_index()
    insert(index, namespace, every_piece(namespace, prefix)[0], 0, State.WRITING)
    reached = walk(index, namespace, prefix, wait=True)
    assert (reached.num_tokens, reached.loading) == (0, [])


@given(
    blocks_per_chunk=st.integers(1, 4),
    num_tokens=st.integers(1, 60),
    first_token=st.integers(0, 60),
    held=st.sets(st.integers(0, 40)),
    loading=st.sets(st.integers(0, 40), max_size=3),
    wait=st.booleans(),
)
def test_a_walk_that_begins_later(
    blocks_per_chunk: int, num_tokens: int, first_token: int, held: set[int], loading: set[int], wait: bool
) -> None:
    """It reaches as far as one whose first chunks are all there, and says where it began."""
    namespace = make_namespace(blocks_per_chunk, 1)
    prefix = make_prefix(namespace, num_tokens)
    first_token = min(first_token, num_tokens)
    first_chunk = first_token // namespace.chunk_size * namespace.chunk_size
    index, full = make_index(), make_index()
    for number, piece in enumerate(every_piece(namespace, prefix)):
        state = State.LOADING if number in loading else State.READY
        is_before = piece.first_token < first_chunk
        if number in held:
            insert(index, namespace, piece, 0, state)
        if is_before and piece.num_tokens == namespace.chunk_size:
            insert(full, namespace, piece, 0)
        elif not is_before and number in held:
            insert(full, namespace, piece, 0, state)
    found = walk(index, namespace, prefix, first_token, wait=wait)
    expected = walk(full, namespace, prefix, wait=wait)
    begins_at = found.first_block * BLOCK_SIZE
    assert begins_at in (0, first_chunk)
    assert (found.next_block, found.complete) == (expected.next_block, expected.complete)
    assert [entry.key for entry in found.loading] == [entry.key for entry in expected.loading]
    assert found.pieces == [piece for piece in expected.pieces if piece.first_token >= begins_at]
