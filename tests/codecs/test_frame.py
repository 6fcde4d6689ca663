import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.errors import FrameError
from kvstrata.frame import HEADER_BYTES, FrameHeader, payload_checksum
from kvstrata.types import MissReason

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


def ascii_text(length: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=length)


def hashes(length: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=length, max_size=length)


headers = st.builds(
    FrameHeader,
    shard=u16 | u32,
    first_token=u64,
    num_tokens=u32,
    block_size=u32,
    payload_bytes=u64,
    encoded_bytes=u64,
    layout_fingerprint=hashes(16),
    chunk_hash=hashes(32),
    tokens_hash=hashes(32),
    payload_checksum=hashes(16),
    created_at=u64,
    codec=ascii_text(16),
    dtype=ascii_text(16),
    codec_parameters=ascii_text(32),
    group=u16,
)


def packed(header: FrameHeader) -> bytearray:
    buffer = bytearray(b"\xff" * HEADER_BYTES)
    header.pack_into(memoryview(buffer))
    return buffer


@given(headers)
def test_round_trip(header):
    assert FrameHeader.unpack(packed(header)) == header


@settings(max_examples=20)
@given(headers, st.integers(1, 255))
def test_any_damaged_byte_is_a_frame_error(header, damage):
    buffer = packed(header)
    for position in range(HEADER_BYTES):
        buffer[position] ^= damage
        with pytest.raises(FrameError) as caught:
            FrameHeader.unpack(bytes(buffer))
        assert caught.value.reason in {MissReason.CORRUPT, MissReason.LAYOUT_MISMATCH}
        buffer[position] ^= damage


@given(headers, st.integers(0, HEADER_BYTES - 1))
def test_truncated_is_a_frame_error(header, length):
    with pytest.raises(FrameError):
        FrameHeader.unpack(bytes(packed(header)[:length]))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES + 64))
def test_foreign_bytes_are_a_frame_error(data):
    with pytest.raises(FrameError):
        FrameHeader.unpack(data)


@given(headers)
def test_the_header_says_nothing_about_bytes_behind_it(header):
    frame = packed(header) + b"payload"
    assert FrameHeader.unpack(memoryview(frame)) == header


def test_packing_writes_the_header_only_and_all_of_it():
    header = FrameHeader(
        shard=1,
        first_token=256,
        num_tokens=100,
        block_size=16,
        payload_bytes=1000,
        encoded_bytes=900,
        layout_fingerprint=b"l" * 16,
        chunk_hash=b"c" * 32,
        tokens_hash=b"t" * 32,
        payload_checksum=payload_checksum(b"x" * 900),
        created_at=1_790_000_000,
        codec="naive",
        dtype="bfloat16",
    )
    frames = [bytearray(bytes([fill]) * (HEADER_BYTES + 10)) for fill in (0, 255)]
    for frame in frames:
        header.pack_into(memoryview(frame))
    assert frames[0][:HEADER_BYTES] == frames[1][:HEADER_BYTES]
    assert frames[1][HEADER_BYTES:] == b"\xff" * 10
    assert FrameHeader.unpack(frames[0]) == header
    other = msgspec.structs.replace(header, num_tokens=101)
    assert packed(other) != packed(header)
