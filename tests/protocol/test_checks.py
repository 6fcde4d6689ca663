from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ProtocolError
from kvstrata.protocol.checks import check_hashes, check_namespace, check_pieces, check_prefix, check_shard
from kvstrata.testing.client import make_namespace, prompt
from kvstrata.types import Piece, Prefix

SPACE = make_namespace(world_size=2)
PIECE = Piece(b"h" * 32, b"p" * 32, 64, 64)


@given(st.integers(0, 300))
def test_real_prompts_pass(count: int) -> None:
    asked = prompt(count, seed=count)
    check_namespace(asked.namespace)
    check_prefix(asked.namespace, asked.prefix)
    check_pieces(asked.namespace, asked.pieces)


@pytest.mark.parametrize(
    ("change", "layout_change"),
    [
        ({"world_size": 0}, {}),
        ({"world_size": -1}, {}),
        ({"world_size": 2**31}, {}),
        ({"chunk_size": 0}, {}),
        ({"chunk_size": 65}, {}),
        ({"chunk_size": 2**40}, {}),
        ({}, {"block_size": 0}),
        ({}, {"block_size": -16}),
        ({}, {"block_size": 128}),
        ({}, {"dtype": "x" * 17}),
        ({}, {"dtype": "größe"}),
        ({}, {"page_bytes": ()}),
        ({}, {"page_bytes": (0,)}),
        ({}, {"page_bytes": (100, -10)}),
        ({}, {"page_bytes": (2**62,)}),
    ],
)
def test_namespaces_that_nothing_can_be_made_of(
    change: dict[str, object], layout_change: dict[str, object]
) -> None:
    layout = msgspec.structs.replace(SPACE.layout, **layout_change)
    with pytest.raises(ProtocolError):
        check_namespace(msgspec.structs.replace(SPACE, layout=layout, **change))


@pytest.mark.parametrize("shard", [-1, 2, 2**16, 2**63])
def test_shards(shard: int) -> None:
    check_shard(SPACE, 0)
    check_shard(SPACE, 1)
    with pytest.raises(ProtocolError):
        check_shard(SPACE, shard)


@pytest.mark.parametrize(
    "prefix",
    [
        Prefix(b"h" * 31, b"", 16, b"r" * 32),
        Prefix(b"h" * 32, b"", 16, b"r" * 31),
        Prefix(b"h" * 32, b"", 15, b"r" * 32),
        Prefix(b"h" * 32, b"", 17, b"r" * 32),
        Prefix(b"h" * 32, b"x" * 32, 16, b"r" * 32),
        Prefix(b"h" * 32, b"x" * 32, 32, b"r" * 32),
        Prefix(b"h" * 32, b"x" * 31, 20, b"r" * 32),
        Prefix(b"", b"", -1, b"r" * 32),
        Prefix(b"", b"x" * 32, -(2**63), b"r" * 32),
    ],
)
def test_prefixes_that_contradict_themselves(prefix: Prefix) -> None:
    with pytest.raises(ProtocolError):
        check_prefix(SPACE, prefix)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_hash": b""},
        {"chunk_hash": b"h" * 33},
        {"parent_hash": b"p"},
        {"tokens_hash": b"t"},
        {"num_tokens": 0},
        {"num_tokens": -1},
        {"num_tokens": 65},
        {"first_token": -1},
        {"first_token": 2**63 - 1},
    ],
)
def test_pieces_that_nothing_can_be_stored_for(change: dict[str, object]) -> None:
    check_pieces(SPACE, [PIECE])
    with pytest.raises(ProtocolError):
        check_pieces(SPACE, [PIECE, msgspec.structs.replace(PIECE, **change)])


def test_hashes() -> None:
    check_hashes([])
    check_hashes([b"x" * 32])
    with pytest.raises(ProtocolError):
        check_hashes([b"x" * 32, b"x" * 31])
