"""Frames that are larger than one value may be: parts under names of their own, a manifest in the frame's place.

The parts' names have the digest of the whole frame in them. So parts of different frames never meet, whoever writes
the same key at the same time; and who reads a manifest either finds all of its parts or misses.
"""

from __future__ import annotations

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


class Manifest(msgspec.Struct, frozen=True):
    """What stands under the name of a frame that was split: 48 bytes, little-endian: magic, size of the frame, size
    of its parts (the last may be smaller), xxh3-128 of the frame, xxh3-64 of all that."""

    frame_bytes: int
    part_bytes: int
    digest: bytes

    @classmethod
    def of(cls, frame: Buffer, part_bytes: int) -> Manifest:
        """The manifest of a frame that is to be split."""
        return cls(len(frame), part_bytes, _digest(frame))

    @classmethod
    def unpack(cls, value: Buffer) -> Manifest | None:
        """The manifest that ``value`` is; None when it is none."""
        if len(value) != MANIFEST_BYTES:
            return None
        magic, frame_bytes, part_bytes, digest = _FIELDS.unpack_from(value)
        (check,) = _CHECK.unpack_from(value, _FIELDS.size)
        if magic != _MAGIC or check != xxhash.xxh3_64_intdigest(bytes(value[: _FIELDS.size])):
            return None
        found = cls(frame_bytes, part_bytes, digest)
        return found if part_bytes and 0 < found.num_parts <= MAX_PARTS else None

    def pack(self) -> bytes:
        fields = _FIELDS.pack(_MAGIC, self.frame_bytes, self.part_bytes, self.digest)
        return fields + _CHECK.pack(xxhash.xxh3_64_intdigest(fields))

    @property
    def num_parts(self) -> int:
        return -(-self.frame_bytes // self.part_bytes)

    def names(self, value_name: bytes) -> list[bytes]:
        """The names of the parts of the frame whose own name is ``value_name``."""
        stem = b"%b@%b" % (value_name, self.digest.hex().encode())
        return [b"%b@%d" % (stem, at) for at in range(self.num_parts)]

    def split(self, frame: memoryview) -> list[memoryview]:
        """The parts of ``frame`` (or of the room for it), without a copy."""
        ends = range(self.part_bytes, self.frame_bytes + self.part_bytes, self.part_bytes)
        return [frame[end - self.part_bytes : min(end, self.frame_bytes)] for end in ends]

    def is_whole(self, frame: memoryview, sizes: Sequence[object]) -> bool:
        """Whether parts of ``sizes``, read to where they belong, are this frame."""
        if list(sizes) != [len(part) for part in self.split(frame)]:
            return False
        return _digest(frame[: self.frame_bytes]) == self.digest


def must_split(frame: memoryview, max_value_bytes: int) -> bool:
    """Whether a frame is too large, or would be taken for a manifest."""
    return len(frame) > max_value_bytes or Manifest.unpack(frame) is not None


def _digest(frame: Buffer) -> bytes:
    return xxhash.xxh3_128_digest(frame)
