"""The codecs that compress without loss."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from kvstrata.codecs.base import Codec
from kvstrata.codecs.floats import FloatsCodec
from kvstrata.codecs.lz4 import LZ4Codec
from kvstrata.codecs.zstd import ZstdCodec, ZstdOptions
from kvstrata.errors import FrameError
from kvstrata.testing.codec import CodecContract, describe_payload, make_payload
from kvstrata.types import MissReason


class TestZstdContract(CodecContract):
    def make_codec(self) -> Codec:
        return ZstdCodec(ZstdOptions(level=3))


class TestLZ4Contract(CodecContract):
    def make_codec(self) -> Codec:
        return LZ4Codec()


class TestFloatsContract(CodecContract):
    def make_codec(self) -> Codec:
        return FloatsCodec()


LOSSLESS = [ZstdCodec(), LZ4Codec(), FloatsCodec()]


def encode(codec: Codec, payload: bytes, dtype: str) -> bytes:
    what = describe_payload(len(payload), dtype)
    into = bytearray(codec.max_encoded_bytes(what))
    return bytes(into[: codec.encode(memoryview(payload), what, memoryview(into))])


def decode(codec: Codec, encoded: bytes, size: int, dtype: str) -> bytes:
    into = bytearray(size)
    codec.decode(memoryview(encoded), describe_payload(size, dtype), codec.parameters, memoryview(into))
    return bytes(into)


@pytest.mark.parametrize("codec", LOSSLESS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint8", "float32"])
def test_what_does_not_compress_does_not_grow(codec: Codec, dtype: str) -> None:
    for size in (0, 1, 7, 8, 9, 100, 100_001):
        payload = make_payload(size, "noise")
        assert encode(codec, payload, dtype) == payload


@pytest.mark.parametrize("codec", LOSSLESS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint8"])
def test_every_value_of_a_type_survives(codec: Codec, dtype: str) -> None:
    """All 65,536 of the 16-bit types, all 256 bytes of fp8 and int8: every NaN, infinity and zero among them."""
    values = np.arange(65_536, dtype="<u2") if dtype != "uint8" else np.arange(256, dtype=np.uint8)
    payload = values.tobytes() + bytes(3 * values.nbytes)
    encoded = encode(codec, payload, dtype)
    assert len(encoded) < len(payload)
    assert decode(codec, encoded, len(payload), dtype) == payload


@pytest.mark.parametrize("name", ["zstd", "floats"])
def test_exponents_of_normal_values_take_less_than_half_their_bits(name: str) -> None:
    codec = ZstdCodec() if name == "zstd" else FloatsCodec()
    values = np.random.default_rng(1).normal(size=200_000).astype("<f4")
    payload = (values.view("<u4") >> 16).astype("<u2").tobytes()
    assert len(payload) / len(encode(codec, payload, "bfloat16")) > 1.4


@pytest.mark.parametrize("codec", LOSSLESS, ids=lambda codec: codec.name)
def test_planes_whose_sizes_lie_are_corrupt(codec: Codec) -> None:
    payload = make_payload(4096, "normal")
    encoded = bytearray(encode(codec, payload, "bfloat16"))
    low, high = (int.from_bytes(encoded[at : at + 8], "little") for at in (0, 8))
    for lie in ((low + 1, high - 1), (high, low), (low + high, 0), (2**64 - 1, high), (2**63, 2**63)):
        encoded[:16] = b"".join(size.to_bytes(8, "little") for size in lie)
        with pytest.raises(FrameError) as caught:
            decode(codec, bytes(encoded), 4096, "bfloat16")
        assert caught.value.reason == MissReason.CORRUPT


@pytest.mark.parametrize("codec", LOSSLESS, ids=lambda codec: codec.name)
def test_memory_that_is_not_contiguous_is_refused(codec: Codec) -> None:
    payload = memoryview(bytearray(make_payload(8192, "normal")))[::2]
    with pytest.raises((ValueError, BufferError, TypeError)):
        codec.encode(payload, describe_payload(4096), memoryview(bytearray(4096)))


@pytest.mark.parametrize(
    ("spelling", "library", "extra"),
    [
        ("zstd", "zstandard", "codecs"),
        ("floats", "numpy", "codecs"),
        ("lz4", "lz4", "codecs"),
        ("aesgcm", "cryptography", "encryption"),
    ],
)
def test_a_missing_library_is_one_clear_line(spelling: str, library: str, extra: str) -> None:
    """Also for a reader that meets such a frame: a miss that says what to install."""
    program = f"""
import sys
sys.modules[{library!r}] = None
from kvstrata.codecs.open import Decoders, open_codec
from kvstrata.errors import FrameError, PluginError
for attempt in (open_codec, Decoders().find):
    try:
        attempt({spelling!r})
    except (PluginError, FrameError) as error:
        print(getattr(error, "reason", "refused"), error)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split()[0] for line in output] == ["refused", "unknown_codec"]
    assert all(f"pip install 'kvstrata[{extra}]'" in line for line in output)
