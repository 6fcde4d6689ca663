"""The two Redis entries of a shard: their names and what is in them."""

from __future__ import annotations

import re

import msgspec

from kvstrata.errors import FrameError
from kvstrata.frame import FRAME_VERSION, HEADER_BYTES, FrameHeader
from kvstrata.tiers.redis.parts import Manifest
from kvstrata.types import is_key, parse_key

VALUE_SUFFIX = b"kv_bytes"
METADATA_SUFFIX = b"metadata"


_ENGINE = re.compile(r"[A-Za-z0-9._-]+@")


class Entry(msgspec.Struct, frozen=True):
    """One shard to be written."""

    value_name: bytes
    metadata_name: bytes
    frame: memoryview
    metadata: list[bytes]
    """Fields and values, alternating."""
    manifest: Manifest | None
    """When the frame is stored in parts."""

    @property
    def value(self) -> memoryview:
        """What stands under the frame's name: itself, or its manifest."""
        return self.frame if self.manifest is None else memoryview(self.manifest.pack())


def is_own_key(text: str) -> bool:
    """Whether ``text`` is a readable key of kvstrata, without another one's prefix before the engine's name."""
    return _ENGINE.match(text) is not None and is_key(text)


def metadata(key: str, frame: memoryview, *, num_parts: int = 0) -> list[bytes]:
    """Fields and values, alternating, of the hash beside a frame that may be stored in parts."""
    parsed = parse_key(key)
    fields: dict[str, str | int] = {
        "model_name": parsed.model_name,
        "engine": parsed.engine,
        "world_size": parsed.world_size,
        "worker_id": parsed.worker_id,
        "frame_bytes": len(frame),
        "version": FRAME_VERSION,
    }
    if num_parts:
        fields["parts"] = num_parts
    try:
        header = FrameHeader.unpack(frame[:HEADER_BYTES])
    except FrameError:
        pass  # a tier stores whatever it is given; only what the key says is known then
    else:
        fields |= {
            "format": header.codec,
            "num_tokens": header.num_tokens,
            "dtype": header.dtype,
            "layout": header.layout_fingerprint.hex(),
            "payload_bytes": header.payload_bytes,
            "created_at": header.created_at,
        }
    return [str(part).encode() for item in fields.items() for part in item]


def escape_glob(text: bytes) -> bytes:
    """``text`` as a pattern that matches only itself."""
    for character in (b"\\", b"*", b"?", b"[", b"]"):
        text = text.replace(character, b"\\" + character)
    return text
