"""Sealing, encoding and accepting frames in slots."""

from __future__ import annotations

import random

import msgspec
import pytest

from kvstrata.cache.frames import Transfer, accept_frame, encode_frame, prepare, read_buffer, seal
from kvstrata.codecs.base import Codec
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import Decoders
from kvstrata.frame import HEADER_BYTES, MAX_GROWTH_BYTES, FrameHeader
from kvstrata.testing.codec import ZipCodec
from kvstrata.types import KVLayout, MissReason

PAYLOAD_BYTES = 10_000


CODECS: dict[str, Codec] = {"naive": NaiveCodec(), "zip": ZipCodec()}
DECODERS = Decoders(known=CODECS.values())
LAYOUT = KVLayout(block_size=16, page_bytes=(PAYLOAD_BYTES,), dtype="bfloat16", kernel_format="test")


def transfer(seed: int = 0, *, shard: int = 0, slot: memoryview | None = None) -> Transfer:
    expected = FrameHeader(
        shard=shard,
        first_token=64,
        num_tokens=16,
        block_size=16,
        payload_bytes=PAYLOAD_BYTES,
        encoded_bytes=PAYLOAD_BYTES,
        layout_fingerprint=b"l" * 16,
        chunk_hash=bytes([seed]) * 32,
        tokens_hash=b"t" * 32,
        payload_checksum=b"",
        created_at=1,
        codec="naive",
        dtype="bfloat16",
    )
    room = slot or memoryview(bytearray(HEADER_BYTES + PAYLOAD_BYTES + MAX_GROWTH_BYTES))
    return Transfer("key", room[: HEADER_BYTES + PAYLOAD_BYTES], expected, LAYOUT, room)


def stored(seed: int = 0, *, shard: int = 0, slot: memoryview | None = None, content: int = 0) -> Transfer:
    """A slot that a worker has filled."""
    made = transfer(seed, shard=shard, slot=slot)
    prepare(made)
    made.payload[:] = data(content or seed)
    return made


def data(seed: int) -> bytes:
    """Half random, so that it can be compressed."""
    return random.Random(seed).randbytes(PAYLOAD_BYTES // 2) * 2


@pytest.mark.parametrize("written_by", ["naive", "zip"])
@pytest.mark.parametrize("read_by", ["naive", "zip"])
def test_frames_come_back_whatever_codec_the_reader_has(written_by: str, read_by: str) -> None:
    frame = bytes(encode_frame(stored(1), CODECS[written_by]))
    into = transfer(1)
    buffer = read_buffer(into, CODECS[read_by])
    buffer[: len(frame)] = frame
    assert accept_frame(into, buffer[: len(frame)], DECODERS) is None
    assert into.payload == data(1)


@pytest.mark.parametrize("codec", ["naive", "zip"])
def test_any_damage_is_a_miss(codec: str) -> None:
    rng = random.Random(codec)
    frame = bytes(encode_frame(stored(1), CODECS[codec]))
    for position in [*range(HEADER_BYTES), *(rng.randrange(len(frame)) for _ in range(200))]:
        damaged = bytearray(frame)
        damaged[position] ^= 1 << rng.randrange(8)
        miss = accept_frame(transfer(1), memoryview(damaged), DECODERS)
        assert miss is not None
        assert miss.reason in (MissReason.CORRUPT, MissReason.LAYOUT_MISMATCH)
    for size in [*range(0, HEADER_BYTES + 2, 7), *(rng.randrange(len(frame)) for _ in range(50))]:
        miss = accept_frame(transfer(1), memoryview(bytearray(frame[:size])), DECODERS)
        assert miss is not None
        assert miss.reason == MissReason.CORRUPT
    assert accept_frame(transfer(1), memoryview(bytearray(frame + b"\0")), DECODERS) is not None


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("chunk_hash", b"x" * 32, MissReason.CORRUPT),
        ("shard", 1, MissReason.CORRUPT),
        ("group", 1, MissReason.CORRUPT),
        ("first_token", 0, MissReason.CORRUPT),
        ("num_tokens", 15, MissReason.CORRUPT),
        ("block_size", 8, MissReason.CORRUPT),
        ("payload_bytes", PAYLOAD_BYTES - 1, MissReason.CORRUPT),
        ("layout_fingerprint", b"o" * 16, MissReason.LAYOUT_MISMATCH),
        ("dtype", "float16", MissReason.LAYOUT_MISMATCH),
        ("codec", "unheard of", MissReason.UNKNOWN_CODEC),
        ("codec", "naive+zip", MissReason.UNKNOWN_CODEC),
        ("codec_parameters", "v2", MissReason.UNKNOWN_CODEC),
    ],
)
def test_a_whole_frame_of_something_else_is_a_miss(field: str, value: object, reason: MissReason) -> None:
    sealed = stored(1)
    seal(sealed)
    msgspec.structs.replace(FrameHeader.unpack(sealed.slot), **{field: value}).pack_into(sealed.slot)
    miss = accept_frame(transfer(1), sealed.slot, DECODERS)
    assert miss is not None
    assert miss.reason == reason


def test_tokens_hash_and_time_survive_being_loaded_and_written_again() -> None:
    first = stored(1)
    header = FrameHeader.unpack(encode_frame(first, CODECS["zip"]))
    assert (header.tokens_hash, header.created_at) == (b"t" * 32, 1)
    loaded = transfer(1)
    other_time = msgspec.structs.replace(loaded.expected, tokens_hash=b"", created_at=9)
    loaded = msgspec.structs.replace(loaded, expected=other_time)
    frame = memoryview(bytearray(encode_frame(first, CODECS["zip"])))
    assert accept_frame(loaded, frame, DECODERS) is None
    again = FrameHeader.unpack(encode_frame(loaded, CODECS["naive"]))
    assert (again.tokens_hash, again.created_at, again.codec) == (b"t" * 32, 1, "naive")


def test_sealing_twice_changes_nothing() -> None:
    sealed = stored(1)
    seal(sealed)
    before = bytes(sealed.slot)
    seal(sealed)
    assert bytes(sealed.slot) == before


@pytest.mark.parametrize("shard", [0, 1])
def test_a_slot_that_held_the_same_tokens_before_is_sealed_for_what_it_holds_now(shard: int) -> None:
    """The KV of the same tokens, computed again, may differ in its last bits."""
    slot = memoryview(bytearray(HEADER_BYTES + PAYLOAD_BYTES))
    seal(stored(1, slot=slot, content=7))
    frame = memoryview(bytearray(encode_frame(stored(1, shard=shard, content=8), CODECS["zip"])))
    loaded = transfer(1, shard=shard, slot=slot)
    assert accept_frame(loaded, frame, DECODERS) is None
    written = bytearray(encode_frame(loaded, CODECS["naive"]))
    back = transfer(1, shard=shard)
    assert accept_frame(back, memoryview(written), DECODERS) is None
    assert back.payload == data(8)
