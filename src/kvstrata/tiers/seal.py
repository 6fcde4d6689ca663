"""What a tier puts behind a frame where its backend may hand out torn or foreign bytes as a success.

Some client libraries free an object's memory while another client still reads it, or report a failed read as done.
The frame's own checksum would find that out above the tiers; the tier contract (never a part, never another key's
frame) wants it found out here.
"""

from __future__ import annotations

import xxhash

SEAL_BYTES = 16


def make_seal(key: str, frame: memoryview) -> bytes:
    """``SEAL_BYTES`` bytes that tell this frame under this key from every other (xxh3-128 of both)."""
    return xxhash.xxh3_128_digest(xxhash.xxh3_128_digest(frame) + key.encode())
