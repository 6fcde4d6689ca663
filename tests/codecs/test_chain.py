"""Codecs one after the other."""

from __future__ import annotations

import struct
from typing import ClassVar

import pytest

from kvstrata.codecs.base import Codec, PayloadDescription, Stage
from kvstrata.codecs.chain import ChainCodec
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import Decoders
from kvstrata.config import chain_fault
from kvstrata.errors import FrameError
from kvstrata.testing.codec import CodecContract, ZipCodec, describe_payload, make_payload
from kvstrata.types import MissReason


class MaskCodec(NaiveCodec):
    """Stands in for an encryption: every byte changed, two bytes added."""

    name: ClassVar[str] = "mask"
    stage: ClassVar[Stage] = Stage.ENCRYPT
    passthrough: ClassVar[bool] = False

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        return what.payload_bytes + 2

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        assert what.dtype == "uint8"
        assert what.payload_bytes == len(payload)
        data = bytes(byte ^ 0x55 for byte in payload) + b"!!"
        into[: len(data)] = data
        return len(data)

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        data = bytes(byte ^ 0x55 for byte in encoded[:-2])
        super().decode(memoryview(data), what, parameters, into)


class TestChainContract(CodecContract):
    def make_codec(self) -> Codec:
        return ChainCodec([ZipCodec(), MaskCodec()])


def test_a_size_that_no_codec_makes_allocates_nothing() -> None:
    chain = ChainCodec([ZipCodec(), MaskCodec()])
    what = describe_payload(1000)
    for size in (1001, 2**40, 2**64 - 1):
        with pytest.raises(FrameError) as caught:
            chain.decode(
                memoryview(struct.pack("<Q", size) + b"x" * 50), what, "+", memoryview(bytearray(1000))
            )
        assert caught.value.reason == MissReason.CORRUPT


def test_frames_of_a_chain_are_decoded_by_name() -> None:
    decoders = Decoders(known=[ZipCodec(), MaskCodec()])
    chain = decoders.find("zip+mask")
    payload = make_payload(5000)
    what = describe_payload(5000)
    into = memoryview(bytearray(chain.max_encoded_bytes(what)))
    encoded = into[: chain.encode(memoryview(payload), what, into)]
    back = memoryview(bytearray(5000))
    decoders.find("zip+mask").decode(encoded, what, chain.parameters, back)
    assert back == payload
    assert len(encoded) < 5000


@pytest.mark.parametrize(
    "name", ["mask+zip", "zip+zip", "naive+mask", "zip+", "+", "", "nobody", "zip+nobody"]
)
def test_names_that_make_no_codec_are_unknown(name: str) -> None:
    with pytest.raises(FrameError) as caught:
        Decoders(known=[ZipCodec(), MaskCodec()]).find(name)
    assert caught.value.reason == MissReason.UNKNOWN_CODEC


def test_what_can_be_chained() -> None:
    store, quantise, compress, encrypt = Stage
    for fine in ([store], [quantise, compress, encrypt], [quantise, encrypt], [compress, encrypt]):
        assert chain_fault(fine) == ""
    for wrong in ([store, encrypt], [encrypt, compress], [compress, compress], [compress, store]):
        assert chain_fault(wrong)
