"""Codecs that quantise in a core: which engines they take, and what their time counts for."""

from __future__ import annotations

import logging
import time
from typing import ClassVar

import msgspec
import pytest

from kvstrata.client import LocalClient, RemoteClient
from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.open import Decoders, open_codec
from kvstrata.errors import LayoutError
from kvstrata.testing.client import CHUNK_SIZE, Prompt, look, prompt, small_settings
from kvstrata.testing.client import store as store_all
from kvstrata.testing.codec import ZipCodec, describe_kv
from kvstrata.testing.core import open_core, payloads, settle, store, wait_lookup
from kvstrata.testing.forked import ServerHost
from kvstrata.tiers.dict import DictTier
from kvstrata.types import KVLayout, MissReason, Piece

OPAQUE = prompt(2 * CHUNK_SIZE, seed=1)
BLOCK = OPAQUE.namespace.layout.block_size
LAYOUT = describe_kv(BLOCK, block_size=BLOCK).layout
TIERS = ({"kind": "disk", "max_bytes": 1 << 30, "codec": "int4"},)


def with_layout(layout: KVLayout) -> Prompt:
    return prompt(2 * CHUNK_SIZE, seed=1, namespace=msgspec.structs.replace(OPAQUE.namespace, layout=layout))


def halves(piece: Piece, shard: int, size: int) -> bytes:
    """KV of which every codec gives back what it got: one number."""
    del piece, shard
    return b"\x00\x3f" * (size // 2)


@pytest.mark.parametrize("write_policy", ["all", "none"])
def test_an_engine_whose_pages_do_not_unpack_is_refused_where_they_would_have_to(write_policy: str) -> None:
    codec = open_codec("fp8+zstd")
    opaque = with_layout(msgspec.structs.replace(LAYOUT, pages="MLA keeps"))
    with open_core([DictTier(), DictTier()], codecs=[codec], write_policies=["none", write_policy]) as cache:
        if write_policy == "none":
            assert cache.intern(opaque.namespace) == opaque.namespace
        else:
            reason = r"tier tier1: codec fp8\+zstd cannot encode the KV of org/model: MLA keeps"
            with pytest.raises(LayoutError, match=reason):
                cache.intern(opaque.namespace)
            assert cache.namespaces() == []
            assert cache.intern(with_layout(LAYOUT).namespace).layout == LAYOUT


def test_a_lossless_codec_takes_every_engine() -> None:
    with open_core([DictTier()], codecs=[open_codec("floats")]) as cache:
        assert cache.intern(OPAQUE.namespace) is cache.intern(OPAQUE.namespace)


def test_the_same_keys_with_and_without_a_description_are_one_namespace() -> None:
    """Engines of two versions share what they store."""
    with open_core() as cache:
        opaque = with_layout(msgspec.structs.replace(LAYOUT, pages=""))
        assert cache.intern(opaque.namespace) is cache.intern(with_layout(LAYOUT).namespace)


@pytest.mark.parametrize("spelling", ["fp8", "int8", "int4:32"])
def test_what_was_quantised_is_read_and_by_those_who_write_otherwise(spelling: str) -> None:
    tier, codec = DictTier(), open_codec(spelling)
    asked = with_layout(LAYOUT)
    with (
        open_core([tier], codecs=[codec]) as one,
        open_core([tier], codecs=[open_codec("naive")], decoders=Decoders()) as two,
    ):
        store(one, "o", one.intern(asked.namespace), 0, asked.pieces, halves)
        settle(one)
        namespace = two.intern(asked.namespace)
        hit = wait_lookup(two, "o", "r", namespace, asked.prefix)
        assert hit.num_tokens == len(asked)
        for piece, payload in zip(hit.pieces, payloads(two, hit, 0, namespace), strict=True):
            assert payload == halves(piece, 0, len(payload))


def test_what_cannot_be_unpacked_here_is_a_miss_and_stays() -> None:
    tier = DictTier()
    described, opaque = (
        with_layout(LAYOUT),
        with_layout(msgspec.structs.replace(LAYOUT, pages="an older engine")),
    )
    with open_core([tier], codecs=[open_codec("fp8")]) as one, open_core([tier], decoders=Decoders()) as two:
        store(one, "o", one.intern(described.namespace), 0, described.pieces, halves)
        settle(one)
        hit = wait_lookup(two, "o", "r", two.intern(opaque.namespace), opaque.prefix)
        assert (hit.num_tokens, hit.miss_reason) == (0, MissReason.UNKNOWN_CODEC)
        settle(two)
        assert tier.stats().entries == len(described.pieces)


def test_a_refusal_is_said_once_and_requests_go_on(
    tmp_path: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = tuple(tier | {"path": f"{tmp_path}/disk"} for tier in TIERS)
    described = with_layout(LAYOUT)
    monkeypatch.setattr(logging.getLogger("kvstrata"), "propagate", True)
    with (
        ServerHost() as host,
        host.start(small_settings(tiers=tiers)) as server,
        RemoteClient(server.endpoint, "engine", timeout_seconds=10) as client,
    ):
        assert client.wait_connected(10)
        for _ in range(3):
            assert store_all(client, OPAQUE) == 0
            assert not client.lookup("r", OPAQUE.namespace, OPAQUE.prefix).pending, "nothing is waited for"
            client.release("r")
        said = [record.message for record in caplog.records if "cannot encode the KV" in record.message]
        assert len(said) == 1
        assert "refused Register" in said[0]
        assert client.connected
        assert store_all(client, described) == len(described)
        assert look(client, "r", described) == len(described)


def test_a_program_is_told_by_an_error(tmp_path: object) -> None:
    tiers = tuple(tier | {"path": f"{tmp_path}/disk"} for tier in TIERS)
    with LocalClient(small_settings(tiers=tiers)) as client, pytest.raises(LayoutError, match="int4"):
        client.lookup("r", OPAQUE.namespace, OPAQUE.prefix)


class SlowCodec(ZipCodec):
    """Decoding takes its time, reading none."""

    name: ClassVar[str] = "slow"
    seconds = 0.1

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        time.sleep(self.seconds)
        super().decode(encoded, what, parameters, into)


@pytest.mark.parametrize("codec", [SlowCodec(), ZipCodec()], ids=["slow", "fast"])
def test_a_codec_that_makes_a_tier_slower_than_computing_is_avoided(codec: ZipCodec) -> None:
    """What the gate knows of a tier's reads has decoding in it: 0.2 s here, where computing takes 0.02 s."""
    asked = OPAQUE
    with open_core([DictTier()], codecs=[codec], gate="auto", num_workers=3) as cache:
        namespace = cache.intern(asked.namespace)
        store(cache, "o", namespace, 0, asked.pieces, halves)
        settle(cache)
        cache.clear(tiers=False)
        assert wait_lookup(cache, "o", "first", namespace, asked.prefix).num_tokens == len(asked)
        settle(cache)
        cache.release("o", "first")
        cache.clear(tiers=False)
        is_slow = isinstance(codec, SlowCodec)
        size = sum(namespace.layout.payload_bytes(piece.num_tokens) for piece in asked.pieces)
        seconds = size / cache.stats()["rates"]["tier0_bytes_per_second"]
        assert not is_slow or seconds >= SlowCodec.seconds * len(asked.pieces)
        # Much faster than the slow one decodes; much slower than the fast one.
        cache.report_prefill(namespace, len(asked), 0.02 if is_slow else 1000 * seconds)
        hit = wait_lookup(cache, "o", "second", namespace, asked.prefix)
        assert (hit.num_tokens, hit.miss_reason) == ((0, MissReason.GATED) if is_slow else (len(asked), None))
        settle(cache)
