"""``zstd``: byte planes, each compressed by Zstandard (RFC 8878). ``zstd:LEVEL``."""

from __future__ import annotations

from typing import Annotated, ClassVar

import zstandard
from msgspec import Meta

from kvstrata.codecs.base import CodecOptions, corrupt
from kvstrata.codecs.planes import Plane, PlaneCodec

_MAX_WINDOW_BYTES = 1 << 23
"""What decoding a frame may allocate for its window; levels up to 19 stay within it."""

# The fast strategy with the smallest table and the longest minimum: finds nothing, and takes no time over it.
# A target length above 0 would turn off the Huffman coder.
HUFFMAN_ONLY = zstandard.ZstdCompressionParameters(
    window_log=17,
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    search_log=1,
    target_length=0,
    write_content_size=True,
)


class ZstdOptions(CodecOptions, frozen=True):
    """Settings of ``zstd``."""

    level: Annotated[int, Meta(ge=1, le=19)] = 1
    """Compression level, 1 to 19. On KV more than 1 costs much time and gains nothing."""


class ZstdCodec(PlaneCodec):
    """Lossless, for any data; finds what repeats as well."""

    name: ClassVar[str] = "zstd"
    Options: ClassVar[type[CodecOptions]] = ZstdOptions

    def __init__(self, options: ZstdOptions | None = None) -> None:
        super().__init__(options)
        self._level = (options or ZstdOptions()).level

    def pack(self, plane: Plane) -> bytes:
        return zstandard.ZstdCompressor(level=self._level).compress(plane.data)

    def unpack(self, packed: memoryview, plane_bytes: int) -> bytes:
        return zstd_unpack(self.name, packed, plane_bytes)


def zstd_unpack(codec: str, packed: memoryview, plane_bytes: int) -> bytes:
    """Decompress one Zstandard frame that says it has ``plane_bytes`` bytes, and has.

    Raises:
        FrameError: it is none.
    """
    try:
        if zstandard.frame_content_size(packed) != plane_bytes:
            raise corrupt(codec, "a plane has another size")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        data = decompressor.decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise corrupt(codec, str(error)) from None
    if len(data) != plane_bytes:
        raise corrupt(codec, "a plane has another size")
    return data
