"""``lz4``: byte planes, each compressed by LZ4 (its block format)."""

from __future__ import annotations

from typing import ClassVar

import lz4.block

from kvstrata.codecs.base import corrupt
from kvstrata.codecs.planes import Plane, PlaneCodec


class LZ4Codec(PlaneCodec):
    """Lossless, for any data; finds what repeats, has no entropy coding."""

    name: ClassVar[str] = "lz4"

    def pack(self, plane: Plane) -> bytes:
        packed: bytes = lz4.block.compress(plane.data, store_size=False)
        return packed

    def unpack(self, packed: memoryview, plane_bytes: int) -> bytes:
        try:
            data: bytes = lz4.block.decompress(packed, uncompressed_size=plane_bytes)
        except lz4.block.LZ4BlockError as error:
            raise corrupt(self.name, str(error)) from None
        if len(data) != plane_bytes:
            raise corrupt(self.name, "a plane has another size")
        return data
