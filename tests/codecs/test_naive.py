from kvstrata.codecs.base import Codec
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.testing.codec import CodecContract


class TestNaiveContract(CodecContract):
    def make_codec(self) -> Codec:
        return NaiveCodec()
