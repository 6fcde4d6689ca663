"""The codecs that compress without loss."""

from __future__ import annotations

from kvstrata.codecs.base import Codec
from kvstrata.codecs.floats import FloatsCodec
from kvstrata.codecs.lz4 import LZ4Codec
from kvstrata.codecs.zstd import ZstdCodec, ZstdOptions
from kvstrata.testing.codec import CodecContract


class TestZstdContract(CodecContract):
    def make_codec(self) -> Codec:
        return ZstdCodec(ZstdOptions(level=3))


class TestLZ4Contract(CodecContract):
    def make_codec(self) -> Codec:
        return LZ4Codec()


class TestFloatsContract(CodecContract):
    def make_codec(self) -> Codec:
        return FloatsCodec()
