"""Messages <-> the parts of a ZMQ message, with limits on what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstrata.errors import ProtocolError
from kvstrata.protocol.messages import Message, Reply, Request

MAX_MESSAGE_BYTES = 64 << 20
"""Of the message part. The hashes of a prompt of 1,000,000 tokens in blocks of 16 are 2 MB."""
MAX_PARTS = 4096
_SEQUENCE_BYTES = 8
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the decoder raises; text that is not UTF-8 and deep nesting have exceptions of their own."""

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

Part = bytes | memoryview


def encode(sequence: int, message: Message, payloads: Sequence[Part] = ()) -> list[Part]:
    """The parts to send."""
    return [sequence.to_bytes(_SEQUENCE_BYTES, "little"), _encoder.encode(message), *payloads]


def decode_request(parts: Sequence[memoryview]) -> tuple[int, Request, Sequence[memoryview]]:
    """Sequence number, request, payload parts.

    Raises:
        ProtocolError: the parts are no request of this protocol.
    """
    sequence = _check(parts)
    try:
        return sequence, _requests.decode(parts[1]), parts[2:]
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a request of this protocol: {error}") from error


def decode_reply(parts: Sequence[memoryview]) -> tuple[int, Reply, Sequence[memoryview]]:
    """Sequence number, reply, payload parts.

    Raises:
        ProtocolError: the parts are no reply of this protocol.
    """
    sequence = _check(parts)
    try:
        return sequence, _replies.decode(parts[1]), parts[2:]
    except _UNDECODABLE as error:
        raise ProtocolError(f"not a reply of this protocol: {error}") from error


def _check(parts: Sequence[memoryview]) -> int:
    if not 2 <= len(parts) <= MAX_PARTS or len(parts[0]) != _SEQUENCE_BYTES:
        raise ProtocolError(f"a message of {len(parts)} parts that does not begin with a sequence number")
    if len(parts[1]) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(parts[1])} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return int.from_bytes(parts[0], "little")
