"""Frames that are larger than one value may be: parts under names of their own, a manifest in the frame's place.

The parts' names have a tag in them that every write draws anew. So parts of different writes never meet, whoever
writes the same key at the same time; and as parts are written before the manifest that names them, and never again,
one that is missing is gone for good. The frame's name is their hash tag: with several servers all of a frame is on
one, and is lost or moved with it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

import msgspec
import xxhash

from kvstrata.types import Buffer

MAX_PARTS = 4096
"""Of one frame. A manifest that names more is none of ours."""

_MAGIC = b"KVSPART1"
_FIELDS = struct.Struct("<8sQQ16s")
_CHECK = struct.Struct("<Q")
MANIFEST_BYTES = _FIELDS.size + _CHECK.size
_TAG_BYTES = 16


class Manifest(msgspec.Struct, frozen=True):
    """What stands under the name of a frame that was split: 48 bytes, little-endian: magic, size of the frame, size
    of its parts (the last may be smaller), tag of the write, xxh3-64 of all that."""

    frame_bytes: int
    part_bytes: int
    tag: bytes

    @classmethod
    def of(cls, frame: Buffer, part_bytes: int) -> Manifest:
        """The manifest of a frame that is to be split; another one each time."""
        return cls(len(frame), part_bytes, os.urandom(_TAG_BYTES))

    @classmethod
    def unpack(cls, value: Buffer) -> Manifest | None:
        """The manifest that ``value`` is; None when it is none."""
        if len(value) != MANIFEST_BYTES:
            return None
        magic, frame_bytes, part_bytes, tag = _FIELDS.unpack_from(value)
        (check,) = _CHECK.unpack_from(value, _FIELDS.size)
        if magic != _MAGIC or check != xxhash.xxh3_64_intdigest(bytes(value[: _FIELDS.size])):
            return None
        found = cls(frame_bytes, part_bytes, tag)
        return found if part_bytes and 0 < found.num_parts <= MAX_PARTS else None

    def pack(self) -> bytes:
        fields = _FIELDS.pack(_MAGIC, self.frame_bytes, self.part_bytes, self.tag)
        return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))

    @property
    def num_parts(self) -> int:
        return -(-self.frame_bytes // self.part_bytes)

    def names(self, value_name: bytes) -> list[bytes]:
        """The names of the parts of the frame whose own name is ``value_name``."""
        stem = b"%b@%b" % (value_name, self.tag.hex().encode())
        return [b"%b@%d{%b}" % (stem, at, value_name) for at in range(self.num_parts)]

    def split(self, frame: memoryview) -> list[memoryview]:
        """The parts of ``frame`` (or of the room for it), without a copy."""
        ends = range(self.part_bytes, self.frame_bytes + self.part_bytes, self.part_bytes)
        return [frame[end - self.part_bytes : min(end, self.frame_bytes)] for end in ends]

    def is_whole(self, sizes: Sequence[object]) -> bool:
        """Whether parts of ``sizes`` are all that was written."""
        full, rest = divmod(self.frame_bytes, self.part_bytes)
        return list(sizes) == [self.part_bytes] * full + ([rest] if rest else [])


def must_split(frame: memoryview, max_value_bytes: int) -> bool:
    """Whether a frame is too large, or would be taken for a manifest."""
    return len(frame) > max_value_bytes or Manifest.unpack(frame) is not None
