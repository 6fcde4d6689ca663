"""Between slots and frames: sealing what is written, checking what was read, encoding and decoding."""

from __future__ import annotations

import threading

import msgspec

from kvstrata.cache.index import Entry
from kvstrata.codecs.base import Codec, PayloadDescription
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import Decoders
from kvstrata.errors import FrameError
from kvstrata.frame import HEADER_BYTES, MAX_GROWTH_BYTES, FrameHeader, payload_checksum
from kvstrata.types import KVLayout, Miss, MissReason


class Transfer(msgspec.Struct, frozen=True, eq=False):
    """One frame on its way between a slot and a tier."""

    key: str
    slot: memoryview
    """The slot: a header, then the payload."""
    expected: FrameHeader
    """What the frame must say of itself; sizes, checksum, codec and time are the frame's own."""
    layout: KVLayout
    """The one that ``expected`` has the fingerprint of."""
    room: memoryview
    """The slot and, for reading, the room behind it."""

    @property
    def payload(self) -> memoryview:
        return self.slot[HEADER_BYTES:]


def transfer_of(pool: memoryview, entry: Entry, tokens_hash: bytes, created_at: int) -> Transfer:
    """An entry's slot, and what a frame in it must say."""
    layout = entry.namespace.layout
    payload_bytes = entry.payload_bytes
    frame_bytes = HEADER_BYTES + payload_bytes
    return Transfer(
        key=entry.namespace.key(entry.chunk_hash, entry.shard),
        slot=pool[entry.offset : entry.offset + frame_bytes],
        room=pool[entry.offset : entry.offset + frame_bytes + MAX_GROWTH_BYTES],
        layout=layout,
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
            salt_id=entry.salt_id,
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


def header_in_slot(transfer: Transfer) -> FrameHeader:
    """The header that a slot has now, whole although a write may be sealing it.

    Raises:
        FrameError: it is none.
    """
    with _seal_lock:
        return FrameHeader.unpack(transfer.slot)


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


def describe(header: FrameHeader, layout: KVLayout) -> PayloadDescription:
    """What a codec is told of a frame's payload. The header has been checked against ``layout``."""
    return PayloadDescription(
        layout=layout,
        num_tokens=header.num_tokens,
        payload_bytes=header.payload_bytes,
        dtype=header.dtype,
        shard=header.shard,
        group=header.group,
        first_token=header.first_token,
        chunk_hash=header.chunk_hash,
        codec=header.codec,
        codec_parameters=header.codec_parameters,
    )


def encode_frame(transfer: Transfer, codec: Codec) -> memoryview:
    """The frame to write. For a passthrough codec that is the slot itself."""
    if codec.passthrough:
        seal(transfer)
        return transfer.slot
    with _seal_lock:
        header = _slot_header(transfer)
    header = msgspec.structs.replace(header, codec=codec.name, codec_parameters=codec.parameters)
    what = describe(header, transfer.layout)
    scratch = memoryview(bytearray(HEADER_BYTES + codec.max_encoded_bytes(what)))
    encoded_bytes = codec.encode(transfer.payload, what, scratch[HEADER_BYTES:])
    frame = scratch[: HEADER_BYTES + encoded_bytes]
    msgspec.structs.replace(
        header, encoded_bytes=encoded_bytes, payload_checksum=payload_checksum(frame[HEADER_BYTES:])
    ).pack_into(frame)
    return frame


def read_buffer(transfer: Transfer, codec: Codec) -> memoryview:
    """Where a tier of that codec should read the frame to: the slot itself wherever the codec allows.

    It has room for a frame of any codec, not only that one: others may have written there.
    """
    return transfer.room if codec.passthrough else memoryview(bytearray(len(transfer.room)))


def accept_frame(transfer: Transfer, frame: memoryview, decoders: Decoders) -> Miss | None:
    """Check a frame that was read and bring its payload into the slot; a miss when it is not the right one."""
    try:
        header = FrameHeader.unpack(frame)
        _check(header, transfer.expected, len(frame))
        encoded = frame[HEADER_BYTES : HEADER_BYTES + header.encoded_bytes]
        if payload_checksum(encoded) != header.payload_checksum:
            raise FrameError(MissReason.CORRUPT, "the payload's checksum is wrong")
        _decode(transfer, header, encoded, decoders)
    except FrameError as error:
        return Miss(MissReason(error.reason), str(error))
    return None


def _decode(transfer: Transfer, header: FrameHeader, encoded: memoryview, decoders: Decoders) -> None:
    codec = decoders.find(header.codec)
    in_place = encoded.obj is transfer.slot.obj
    if codec.passthrough and in_place:
        if len(encoded) != len(transfer.payload):
            raise FrameError(MissReason.CORRUPT, f"payload of {len(encoded)} bytes")
        return
    what = describe(header, transfer.layout)
    source = memoryview(bytes(encoded)) if in_place else encoded
    codec.decode(source, what, header.codec_parameters, transfer.payload)
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
