"""The codecs that quantise."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvstrata.codecs.base import Codec
from kvstrata.codecs.fp8 import MAX_VALUE, VALUES, FP8Codec
from kvstrata.codecs.integers import Int4Codec, Int8Codec, IntegerOptions
from kvstrata.codecs.open import open_codec
from kvstrata.codecs.pages import MAX_NUMBER, from_float32, pack, to_float32, unpack
from kvstrata.errors import ConfigError, FrameError
from kvstrata.testing.codec import describe_kv
from kvstrata.testing.kv_codec import KVCodecContract, make_kv
from kvstrata.types import MissReason


class TestFP8Contract(KVCodecContract):
    tolerance = 1 / 16

    def make_codec(self) -> Codec:
        return FP8Codec()


class TestInt8Contract(KVCodecContract):
    tolerance = 1 / 100

    def make_codec(self) -> Codec:
        return Int8Codec(IntegerOptions(group=32))


class TestInt4Contract(KVCodecContract):
    tolerance = 1 / 12

    def make_codec(self) -> Codec:
        return Int4Codec()


def encode(codec: Codec, kv: np.ndarray, what) -> bytes:
    payload, into = bytearray(what.payload_bytes), bytearray(what.payload_bytes)
    pack(kv, what, memoryview(payload))
    return bytes(into[: codec.encode(memoryview(payload), what, memoryview(into))])


def decode(codec: Codec, encoded: bytes, what) -> np.ndarray:
    into = memoryview(bytearray(what.payload_bytes))
    codec.decode(memoryview(encoded), what, codec.parameters, into)
    return unpack(into, what)


@pytest.mark.parametrize(
    ("spelling", "smaller"),
    [("fp8", 1.99), ("int8", 1.88), ("int4", 3.55), ("int4:128", 3.65), ("int4:32", 3.19)],
)
def test_sizes(spelling: str, smaller: float) -> None:
    what = describe_kv(256, heads=3, dims=64, layers=4)
    encoded = encode(open_codec(spelling), make_kv(what), what)
    assert smaller <= what.payload_bytes / len(encoded) < smaller + 0.05


def test_the_codes_of_fp8_are_those_of_the_standard() -> None:
    """All 256 values, and every bfloat16 to its nearest, ties to even, as torch has them."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make setup")
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    real = ~np.isnan(values)
    assert np.array_equal(VALUES[real], values[real])
    # With 448 itself in each head, the scale is 1.
    what = describe_kv(256, layers=1, heads=1, dims=128)
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = to_float32(bits, "bfloat16")
    bits = bits[np.isfinite(numbers) & (np.abs(numbers) <= MAX_VALUE)]
    kv = np.resize(bits, (1, 2, 256, 1, 128))
    kv[:, :, 0] = from_float32(np.array([MAX_VALUE]), "bfloat16")
    for part in range(2):
        decoded = to_float32(decode(FP8Codec(), encode(FP8Codec(), kv, what), what), "bfloat16")[:, part]
        expected = (
            torch.from_numpy(to_float32(kv, "bfloat16")[:, part].copy()).to(torch.float8_e4m3fn).float()
        )
        assert np.array_equal(decoded, expected.numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_code_of_fp8_with_every_scale(dtype: str) -> None:
    """A frame with a layer for each exponent of a scale; numbers beyond the type's are its largest."""
    exponents = np.arange(-120, 121)
    what = describe_kv(32, dtype, layers=len(exponents), heads=1, dims=8)
    codes = np.tile(np.arange(256, dtype=np.uint8), 2 * len(exponents))
    encoded = exponents.repeat(2).astype(np.int8).tobytes() + codes.tobytes()
    with np.errstate(over="ignore"):
        numbers = np.ldexp(VALUES, exponents[:, None, None])
    expected = from_float32(numbers.clip(-MAX_NUMBER[dtype], MAX_NUMBER[dtype]), dtype)
    found = decode(FP8Codec(), encoded, what)
    assert found.tobytes() == np.broadcast_to(expected, (len(exponents), 2, 256)).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp8_loses_once(dtype: str) -> None:
    what = describe_kv(100, dtype)
    first = encode(FP8Codec(), make_kv(what), what)
    again = encode(FP8Codec(), decode(FP8Codec(), first, what), what)
    assert again == first


@pytest.mark.parametrize("spelling", ["int8", "int4", "cachegen:high", "cachegen", "cachegen:low"])
def test_the_others_lose_little_the_second_time(spelling: str) -> None:
    """As when what one tier has reaches another."""
    codec, what = open_codec(spelling), describe_kv(256, heads=2, dims=64)
    numbers = [make_kv(what)]
    numbers += [once := decode(codec, encode(codec, numbers[0], what), what)]
    numbers += [decode(codec, encode(codec, once, what), what)]
    kv, first, second = (to_float32(each, "bfloat16").astype(np.float64) for each in numbers)
    assert np.square(second - kv).mean() < 1.05**2 * np.square(first - kv).mean()


@pytest.mark.parametrize("spelling", ["fp8", "int8", "int4"])
def test_heads_and_channels_do_not_spoil_each_other(spelling: str) -> None:
    """One that is a thousand times as large leaves the others as they are; channels of keys, for integers."""
    codec = open_codec(spelling)
    what = describe_kv(128, heads=2)
    kv = to_float32(make_kv(what), "bfloat16")
    plain = to_float32(decode(codec, encode(codec, from_float32(kv, "bfloat16"), what), what), "bfloat16")
    kv[:, 0, :, 0, 5] *= 1000
    kv[:, 1, :, 0] *= 1000
    large = to_float32(decode(codec, encode(codec, from_float32(kv, "bfloat16"), what), what), "bfloat16")
    assert np.array_equal(large[:, :, :, 1], plain[:, :, :, 1])
    if spelling != "fp8":
        others = [dim for dim in range(32) if dim != 5]
        assert np.array_equal(large[:, 0][..., others], plain[:, 0][..., others])


@pytest.mark.parametrize("tokens", [100, 128])
@pytest.mark.parametrize("spelling", ["fp8", "int8", "int4", "cachegen"])
def test_how_many_layers_are_worked_on_at_once_changes_nothing(
    spelling: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, what = open_codec(spelling), describe_kv(tokens, heads=2, dims=32, layers=5)
    kv = make_kv(what)
    together = encode(codec, kv, what)
    decoded = decode(codec, together, what)
    for at_once in (1, 2, 4):
        monkeypatch.setattr("kvstrata.codecs.pages._ELEMENTS_AT_ONCE", at_once * tokens * 2 * 32)
        assert encode(codec, kv, what) == together
        assert np.array_equal(decode(codec, together, what), decoded)


@pytest.mark.parametrize("spelling", ["int8", "int4"])
def test_a_group_of_equal_numbers_is_exact(spelling: str) -> None:
    what = describe_kv(70)
    kv = np.full((2, 2, 70, 2, 32), 0x4049, np.uint16)
    codec = open_codec(spelling)
    assert np.array_equal(decode(codec, encode(codec, kv, what), what), kv)


def test_a_group_is_in_the_frame() -> None:
    """A reader of another group size, or of none, decodes what it finds."""
    what = describe_kv(200)
    kv = make_kv(what)
    writer = open_codec("int4:group=32")
    encoded = memoryview(encode(writer, kv, what))
    assert writer.parameters == "v1,32"
    into = memoryview(bytearray(what.payload_bytes))
    Int4Codec().decode(encoded, what, "v1,32", into)
    assert np.array_equal(unpack(into, what), decode(writer, bytes(encoded), what))
    for parameters in ("v1", "v1,8", "v1,512", "v2,32", "v1,32,1", "v1,-32", "v1,\u0663\u0662"):
        with pytest.raises(FrameError) as caught:
            Int4Codec().decode(encoded, what, parameters, into)
        assert caught.value.reason == MissReason.UNKNOWN_CODEC


def test_what_is_quantised_can_be_compressed() -> None:
    what = describe_kv(70, heads=3)
    chain, kv = open_codec("int4+zstd"), make_kv(what)
    encoded = encode(chain, kv, what)
    assert np.array_equal(
        decode(chain, encoded, what), decode(Int4Codec(), encode(Int4Codec(), kv, what), what)
    )
    assert chain.why_not(msgspec.structs.replace(what.layout, pages="")) == Int4Codec().why_not(
        msgspec.structs.replace(what.layout, pages="")
    )
    assert not chain.lossless


@pytest.mark.parametrize("spelling", ["int4:8", "int4:1000", "int8:group=x", "fp8:2", "zstd+fp8", "fp8+int4"])
def test_what_makes_no_sense_is_refused(spelling: str) -> None:
    with pytest.raises(ConfigError):
        open_codec(spelling)


@pytest.mark.parametrize("codec", [FP8Codec(), Int4Codec()], ids=lambda codec: codec.name)
def test_scales_that_no_head_has_are_corrupt(codec: Codec) -> None:
    what = describe_kv(64)
    encoded = bytearray(encode(codec, make_kv(what), what))
    encoded[:4] = b"\x80\x7f\x80\x7f"
    with pytest.raises(FrameError) as caught:
        decode(codec, bytes(encoded), what)
    assert caught.value.reason == MissReason.CORRUPT
