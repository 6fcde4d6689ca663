"""Look-ups in steps find the same prefix as asking for everything, with fewer keys."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_walk import BLOCK_SIZE, every_piece, make_namespace, make_prefix

from kvstrata.cache.steps import contains_in_steps
from kvstrata.cache.walk import Candidates, best_cover
from kvstrata.types import Namespace, Piece, Prefix


def cover(namespace: Namespace, prefix: Prefix, first_block: int, answers: Sequence[int]) -> list[Piece]:
    candidates = Candidates(namespace, prefix, first_block)
    shards = namespace.world_size

    def is_held(piece: Piece) -> bool:
        at = candidates.position(piece)
        return at is not None and all(answers[at * shards : (at + 1) * shards])

    return best_cover(namespace, prefix, first_block, is_held)


@given(st.data())
def test_same_prefix(data: st.DataObject) -> None:
    namespace = make_namespace(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2)))
    prefix = make_prefix(namespace, data.draw(st.integers(1, 20 * BLOCK_SIZE)))
    first_block = data.draw(st.integers(0, prefix.num_blocks))
    candidates = Candidates(namespace, prefix, first_block)
    keys = candidates.keys(range(len(candidates)))
    shards = [
        namespace.key(piece.chunk_hash, shard)
        for piece in every_piece(namespace, prefix)
        for shard in range(namespace.world_size)
    ]
    missing = data.draw(st.sets(st.sampled_from(shards))) if shards else set()
    asked: list[str] = []

    def contains(some: Sequence[str]) -> list[bool]:
        asked.extend(some)
        return [key in shards and key not in missing for key in some]

    everything = contains(keys)
    asked.clear()
    in_steps = contains_in_steps(contains, candidates)
    assert len(asked) == len(set(asked)) <= len(keys)
    assert cover(namespace, prefix, first_block, in_steps) == cover(
        namespace, prefix, first_block, everything
    )


@pytest.mark.parametrize(
    ("num_held", "calls", "num_found"),
    [
        (0, [155], 0),
        (5, [155], 5),
        (16 * 100 + 5, [155, 15], 15 + 100 + 5),
        (16 * 125 + 7, [155], 125 + 15 + 7),
    ],
)
def test_few_keys_are_asked_for(num_held: int, calls: list[int], num_found: int) -> None:
    namespace = make_namespace(16, 1)
    prefix = make_prefix(namespace, 2014 * BLOCK_SIZE + 1)
    candidates = Candidates(namespace, prefix, 0)
    held = set(candidates.keys(range(num_held)))
    asked: list[int] = []

    def contains(some: Sequence[str]) -> list[bool]:
        asked.append(len(some))
        return [key in held for key in some]

    assert sum(contains_in_steps(contains, candidates)) == num_found
    assert asked == calls
