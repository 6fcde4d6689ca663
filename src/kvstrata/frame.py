"""The frame header.

A **frame** is what a tier stores: a header of fixed size, then the encoded payload. It describes itself,
so that a reader can tell a right frame from one that is corrupt, truncated, foreign or stale.
"""

from __future__ import annotations

import struct
from typing import Self

import msgspec
import xxhash

from kvstrata.errors import FrameError
from kvstrata.types import SALT_ID_BYTES, MissReason

MAGIC = b"KVST"
FRAME_VERSION = 1
HEADER_BYTES = 256
MAX_GROWTH_BYTES = 64
"""An encoded payload is at most this much larger than the payload. Every slot has that much room behind it, so that
a frame of any codec can be read into it."""

_FIELDS = struct.Struct("<4sHHIIQIIQQ16s32s32s16sQ16s16s32s16s")
_TOKENS_HASH_AT = struct.calcsize("<4sHHIIQIIQQ16s32s")
_SALT_ID_AT = struct.calcsize("<4sHHIIQIIQQ16s32s32s16sQ16s16s32s")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = HEADER_BYTES - _CHECKSUM.size


class FrameHeader(msgspec.Struct, frozen=True):
    """What the first :data:`HEADER_BYTES` bytes of a frame say.

    Little-endian: magic, version, header bytes, KV cache group, shard, first token, tokens, block size,
    payload bytes, encoded bytes, layout fingerprint, chunk hash, tokens hash, checksum of the encoded
    payload (xxh3-128), creation time, codec, dtype, codec parameters, id of the salt, padding, checksum of
    the header.
    """

    shard: int
    first_token: int
    """Position of the first token in the sequence it was computed in."""
    num_tokens: int
    block_size: int
    payload_bytes: int
    encoded_bytes: int
    layout_fingerprint: bytes
    chunk_hash: bytes
    tokens_hash: bytes
    """SHA-256 of the tokens alone, without their prefix; zeros when not known."""
    payload_checksum: bytes
    """xxh3-128 of the encoded payload."""
    created_at: int
    """Unix seconds."""
    codec: str
    dtype: str
    codec_parameters: str = ""
    group: int = 0
    """KV cache group, for hybrid models; 0 for plain ones."""
    salt_id: bytes = b""
    """Whose it is (``hashing.salt_id``), for quotas; empty: nobody's, or not known."""

    def pack_into(self, buffer: memoryview) -> None:
        """Write the header to the first :data:`HEADER_BYTES` bytes of ``buffer``."""
        _FIELDS.pack_into(
            buffer,
            0,
            MAGIC,
            FRAME_VERSION,
            HEADER_BYTES,
            self.group,
            self.shard,
            self.first_token,
            self.num_tokens,
            self.block_size,
            self.payload_bytes,
            self.encoded_bytes,
            self.layout_fingerprint,
            self.chunk_hash,
            self.tokens_hash,
            self.payload_checksum,
            self.created_at,
            self.codec.encode(),
            self.dtype.encode(),
            self.codec_parameters.encode(),
            self.salt_id,
        )
        buffer[_FIELDS.size : _CHECKSUM_AT] = bytes(_CHECKSUM_AT - _FIELDS.size)
        _CHECKSUM.pack_into(buffer, _CHECKSUM_AT, xxhash.xxh3_64_intdigest(buffer[:_CHECKSUM_AT]))

    @classmethod
    def unpack(cls, buffer: memoryview | bytes) -> Self:
        """Read a header.

        Raises:
            FrameError: too short, no magic, another version, or the header's checksum is wrong.
        """
        view = memoryview(buffer)
        if len(view) < HEADER_BYTES:
            raise FrameError(MissReason.CORRUPT, f"frame of {len(view)} bytes is shorter than a header")
        fields = _FIELDS.unpack_from(view)
        magic, version, header_bytes = fields[:3]
        if magic != MAGIC:
            raise FrameError(MissReason.CORRUPT, f"not a frame of kvstrata (magic {magic!r})")
        if version != FRAME_VERSION or header_bytes != HEADER_BYTES:
            raise FrameError(MissReason.LAYOUT_MISMATCH, f"frame version {version} is not understood")
        (expected,) = _CHECKSUM.unpack_from(view, _CHECKSUM_AT)
        if xxhash.xxh3_64_intdigest(view[:_CHECKSUM_AT]) != expected:
            raise FrameError(MissReason.CORRUPT, "the header's checksum is wrong")
        return cls(
            group=fields[3],
            shard=fields[4],
            first_token=fields[5],
            num_tokens=fields[6],
            block_size=fields[7],
            payload_bytes=fields[8],
            encoded_bytes=fields[9],
            layout_fingerprint=fields[10],
            chunk_hash=fields[11],
            tokens_hash=fields[12],
            payload_checksum=fields[13],
            created_at=fields[14],
            codec=_text(fields[15]),
            dtype=_text(fields[16]),
            codec_parameters=_text(fields[17]),
            salt_id=fields[18] if any(fields[18]) else b"",
        )


def room_bytes(payload_bytes: int) -> int:
    """What a slot must hold: a header, the payload, and room for the frame of any codec."""
    return HEADER_BYTES + payload_bytes + MAX_GROWTH_BYTES


def tokens_hash_in(frame: memoryview) -> bytes:
    """The tokens' hash that a header says, without a look at the rest of it; for searches."""
    return bytes(frame[_TOKENS_HASH_AT : _TOKENS_HASH_AT + 32])


def salt_id_in(frame: memoryview) -> bytes:
    """Whose a frame says that it is; empty when it does not, or is none. Without a look at the rest of it."""
    if len(frame) < HEADER_BYTES or frame[: len(MAGIC)] != MAGIC:
        return b""
    salt_id = bytes(frame[_SALT_ID_AT : _SALT_ID_AT + SALT_ID_BYTES])
    return salt_id if any(salt_id) else b""


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", "replace")


def payload_checksum(data: memoryview | bytes) -> bytes:
    """xxh3-128 of an encoded payload, 16 bytes."""
    return xxhash.xxh3_128_digest(data)
