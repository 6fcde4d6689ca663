"""InfiniStore's protocol over TCP, as its version 0.2.35 speaks it (``src/protocol.h`` there).

A request is a header of nine bytes and a body: a key, or a FlatBuffers table. A put is followed by the value.
An answer is a code, and with code 200 what the operation brings: a count, a size and the value.

Its client library is not used: it waits without a deadline, hangs when a key is missing, and when the server is
gone it ends the process with a segmentation fault (all seen with 0.2.35).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

FINISH = 200
NOT_FOUND = 404
NO_MEMORY = 507
EXISTS = 0
"""What a check brings for a key that is there."""
MAX_VALUE_BYTES = (1 << 31) - 1
WORD = struct.Struct("<i")

_MAGIC = 0xDEADBEEF
_HEADER = struct.Struct("<IcI")
_PAYLOAD_TABLE = struct.Struct("<I HHHHH xx i I i b xxx")
_KEYS_TABLE = struct.Struct("<I HHH xx i I")


def check_request(key: str) -> bytes:
    """Is ``key`` there? Answer: code, ``EXISTS`` or another number."""
    return _request(b"C", key.encode())


def get_request(key: str) -> bytes:
    """The value of ``key``. Answer: code; with code 200 the size and the value."""
    return _request(b"L", _payload_table(key, 0, b"G"))


def put_request(key: str, value_bytes: int) -> bytes:
    """To be followed by the value. Answer: code."""
    return _request(b"L", _payload_table(key, value_bytes, b"P"))


def delete_request(keys: Sequence[str]) -> bytes:
    """Answer: code; with code 200 how many there were."""
    return _request(b"X", _keys_table(keys))


def _request(operation: bytes, body: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, operation, len(body)) + body


def _string(text: bytes) -> bytes:
    """A FlatBuffers string: length, bytes, zero, padded to a multiple of four."""
    padding = 4 - len(text) % 4
    return struct.pack("<I", len(text)) + text + bytes(padding)


def _payload_table(key: str, value_bytes: int, operation: bytes) -> bytes:
    """``table {key: string; value_length: int; op: byte}``.

    In FlatBuffers: where the table is; its vtable (size, the table's size, where each field is); then the table,
    which begins with the distance to its vtable and has the distance to the string.
    """
    head = _PAYLOAD_TABLE.pack(16, 10, 16, 4, 8, 12, 12, 12, value_bytes, operation[0])
    return head + _string(key.encode())


def _keys_table(keys: Sequence[str]) -> bytes:
    """``table {keys: [string]}``: the table as above, the vector's length and distances, the strings."""
    strings = [_string(key.encode()) for key in keys]
    distances, position = [], 4 * len(keys)
    for index, text in enumerate(strings):
        distances.append(position - 4 * index)
        position += len(text)
    vector = struct.pack(f"<I{len(keys)}I", len(keys), *distances)
    return _KEYS_TABLE.pack(12, 6, 8, 4, 8, 4) + vector + b"".join(strings)
