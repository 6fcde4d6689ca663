"""What stands in front of a value on disk, so that a file says what it is, and under which name it lies there."""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Self

import msgspec
import xxhash

from kvstrata.tiers.lm.wire import Form
from kvstrata.tiers.paths import key_path
from kvstrata.types import Buffer

ENVELOPE_BYTES = 128
_MAGIC = b"KVLM"
_VERSION = 1
_FIELDS = struct.Struct("<4sI32s7iQdQ")
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = ENVELOPE_BYTES - _CHECKSUM.size


class Envelope(msgspec.Struct, frozen=True):
    """Little-endian: magic, version, SHA-256 of the key, form, checksum of the value, expiry, size, padding,
    checksum of the envelope."""

    form: Form
    checksum: int
    expires_at: float
    """Unix seconds; infinite for never."""
    size: int

    def pack_into(self, buffer: memoryview, key: bytes) -> None:
        """Write it to the first :data:`ENVELOPE_BYTES` bytes of ``buffer``."""
        form = self.form
        _FIELDS.pack_into(
            buffer,
            0,
            _MAGIC,
            _VERSION,
            hashlib.sha256(key).digest(),
            form.format,
            form.dtype,
            *form.shape,
            form.location,
            self.checksum,
            self.expires_at,
            self.size,
        )
        buffer[_FIELDS.size : _CHECKSUM_AT] = bytes(_CHECKSUM_AT - _FIELDS.size)
        _CHECKSUM.pack_into(buffer, _CHECKSUM_AT, xxhash.xxh3_64_intdigest(buffer[:_CHECKSUM_AT]))

    @classmethod
    def unpack(cls, data: Buffer, key: bytes) -> Self | None:
        """Read it; None when these are not the whole bytes that were written for ``key``."""
        view = memoryview(data)
        if len(view) < ENVELOPE_BYTES:
            return None
        magic, version, digest, kind, dtype, *rest = _FIELDS.unpack_from(view)
        *shape, location, checksum, expires_at, size = rest
        (expected,) = _CHECKSUM.unpack_from(view, _CHECKSUM_AT)
        right = (
            magic == _MAGIC
            and version == _VERSION
            and xxhash.xxh3_64_intdigest(view[:_CHECKSUM_AT]) == expected
            and digest == hashlib.sha256(key).digest()
            and size == len(view) - ENVELOPE_BYTES
            and not math.isnan(expires_at)
        )
        return cls(Form(kind, dtype, tuple(shape), location), checksum, expires_at, size) if right else None


def disk_key(key: bytes) -> str:
    """The name of ``key`` in the disk tier: its own, if it is one of kvstrata, else one made of its SHA-256."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        text = ""
    if text and not text.startswith(_OTHERS) and key_path(text) is not None:
        return text
    return f"{_OTHERS}{hashlib.sha256(key).hexdigest()}"


def original_key(disk_key: str) -> bytes | None:
    """The key that lies under ``disk_key``; None for one that cannot be had back from its SHA-256."""
    return None if disk_key.startswith(_OTHERS) else disk_key.encode()


_OTHERS = "lm@other@1@0@"
