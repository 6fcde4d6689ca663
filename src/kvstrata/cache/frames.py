"""Between slots and frames: sealing what is written, checking what was read, encoding and decoding."""

from __future__ import annotations

import threading

import msgspec

from kvstrata.cache.index import Entry
from kvstrata.codecs.base import Codec
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.errors import FrameError
from kvstrata.frame import HEADER_BYTES, FrameHeader, payload_checksum
from kvstrata.types import Miss, MissReason


class Transfer(msgspec.Struct, frozen=True, eq=False):
    """One frame on its way between a slot and a tier."""

    key: str
    slot: memoryview
    """The slot: a header, then the payload."""
    expected: FrameHeader
    """What the frame must say of itself; sizes, checksum, codec and time are the frame's own."""

    @property
    def payload(self) -> memoryview:
        return self.slot[HEADER_BYTES:]


def transfer_of(pool: memoryview, entry: Entry, tokens_hash: bytes, created_at: int) -> Transfer:
    """An entry's slot, and what a frame in it must say."""
    layout = entry.namespace.layout
    payload_bytes = entry.payload_bytes
    return Transfer(
        key=entry.namespace.key(entry.chunk_hash, entry.shard),
        slot=pool[entry.offset : entry.offset + HEADER_BYTES + payload_bytes],
        expected=FrameHeader(
            shard=entry.shard,
            first_token=entry.first_token,
            num_tokens=entry.num_tokens,
            block_size=layout.block_size,
            payload_bytes=payload_bytes,
            encoded_bytes=payload_bytes,
            layout_fingerprint=layout.fingerprint,
            chunk_hash=entry.chunk_hash,
            tokens_hash=tokens_hash,
            payload_checksum=b"",
            created_at=created_at,
            codec=NaiveCodec.name,
            dtype=layout.dtype,
        ),
    )


_seal_lock = threading.Lock()
"""Two tiers may write one slot at once, and both would seal its header."""


def prepare(transfer: Transfer) -> None:
    """Begin a slot: a header without checksum, in place of what an earlier frame left there."""
    transfer.expected.pack_into(transfer.slot)


def _slot_header(transfer: Transfer) -> FrameHeader:
    """The header in the slot, which also knows the tokens' hash and the time."""
    try:
        header = FrameHeader.unpack(transfer.slot)
    except FrameError:
        return transfer.expected
    return header if header.chunk_hash == transfer.expected.chunk_hash else transfer.expected


def seal(transfer: Transfer) -> None:
    """Complete the header in the slot, so that the slot is a whole frame of the ``naive`` codec. Idempotent."""
    with _seal_lock:
        header = _slot_header(transfer)
        if header.codec != NaiveCodec.name or not any(header.payload_checksum):
            msgspec.structs.replace(
                header,
                codec=NaiveCodec.name,
                codec_parameters="",
                encoded_bytes=header.payload_bytes,
                payload_checksum=payload_checksum(transfer.payload),
            ).pack_into(transfer.slot)


def encode_frame(transfer: Transfer, codec: Codec) -> memoryview:
    """The frame to write. For a passthrough codec that is the slot itself."""
    if codec.passthrough:
        seal(transfer)
        return transfer.slot
    scratch = memoryview(bytearray(HEADER_BYTES + codec.max_encoded_bytes(len(transfer.payload))))
    encoded_bytes = codec.encode(transfer.payload, scratch[HEADER_BYTES:])
    frame = scratch[: HEADER_BYTES + encoded_bytes]
    with _seal_lock:
        header = _slot_header(transfer)
    msgspec.structs.replace(
        header,
        encoded_bytes=encoded_bytes,
        codec=codec.name,
        codec_parameters=codec.parameters,
        payload_checksum=payload_checksum(frame[HEADER_BYTES:]),
    ).pack_into(frame)
    return frame


def read_buffer(transfer: Transfer, codec: Codec) -> memoryview:
    """Where a tier of that codec should read the frame to: the slot itself wherever the codec allows."""
    if codec.passthrough:
        return transfer.slot
    payload_bytes = len(transfer.payload)
    size = HEADER_BYTES + max(payload_bytes, codec.max_encoded_bytes(payload_bytes))
    return memoryview(bytearray(size))


def accept_frame(transfer: Transfer, frame: memoryview, codecs: dict[str, Codec]) -> Miss | None:
    """Check a frame that was read and bring its payload into the slot; a miss when it is not the right one."""
    try:
        header = FrameHeader.unpack(frame)
        _check(header, transfer.expected, len(frame))
        encoded = frame[HEADER_BYTES : HEADER_BYTES + header.encoded_bytes]
        if payload_checksum(encoded) != header.payload_checksum:
            raise FrameError(MissReason.CORRUPT, "the payload's checksum is wrong")
        _decode(transfer, header, encoded, codecs)
    except FrameError as error:
        return Miss(MissReason(error.reason), str(error))
    return None


def _decode(transfer: Transfer, header: FrameHeader, encoded: memoryview, codecs: dict[str, Codec]) -> None:
    codec = codecs.get(header.codec)
    if codec is None:
        raise FrameError(MissReason.LAYOUT_MISMATCH, f"codec {header.codec!r} is not known here")
    in_place = encoded.obj is transfer.slot.obj
    if codec.passthrough and in_place:
        if len(encoded) != len(transfer.payload):
            raise FrameError(MissReason.CORRUPT, f"payload of {len(encoded)} bytes")
        return
    codec.decode(
        memoryview(bytes(encoded)) if in_place else encoded, header.codec_parameters, transfer.payload
    )
    if not in_place:
        # The slot may still have the header of an earlier frame: other bytes of the same tokens, or another shard.
        header.pack_into(transfer.slot)


def _check(header: FrameHeader, expected: FrameHeader, frame_bytes: int) -> None:
    """Raises FrameError unless the frame is whole and is the one that was asked for."""
    if header.layout_fingerprint != expected.layout_fingerprint or header.dtype != expected.dtype:
        raise FrameError(MissReason.LAYOUT_MISMATCH, "the frame has another layout")
    identity = ("chunk_hash", "shard", "group", "first_token", "num_tokens", "block_size", "payload_bytes")
    for field in identity:
        if getattr(header, field) != getattr(expected, field):
            raise FrameError(MissReason.CORRUPT, f"the frame is another one: {field} differs")
    if frame_bytes != HEADER_BYTES + header.encoded_bytes:
        raise FrameError(MissReason.CORRUPT, f"{frame_bytes} bytes, {header.encoded_bytes} announced")
