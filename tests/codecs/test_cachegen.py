"""``cachegen``: what it keeps, what it does not, and what it makes of odd payloads."""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.codecs.base import Codec, PayloadDescription
from kvstrata.codecs.cachegen import LEVELS, CacheGenCodec, CacheGenOptions
from kvstrata.codecs.open import open_codec
from kvstrata.codecs.pages import ELEMENTS, MAX_NUMBER, from_float32, kv_shape, pack, to_float32, unpack
from kvstrata.errors import ConfigError, FrameError
from kvstrata.testing.codec import PAGE_ORDERS, describe_kv
from kvstrata.testing.kv_codec import KVCodecContract
from kvstrata.types import MissReason

LEVEL_NAMES = [*LEVELS]


def numbers_of(payload: bytes, what: PayloadDescription) -> np.ndarray:
    """Layers x 2 x tokens x heads x dims, as float64."""
    kv = unpack(memoryview(payload), what)
    return to_float32(kv, what.dtype).astype(np.float64)


def payload_of(numbers: np.ndarray, what: PayloadDescription) -> bytes:
    payload, largest = bytearray(what.payload_bytes), MAX_NUMBER[what.dtype]
    elements = from_float32(np.clip(numbers, -largest, largest).astype(np.float32), what.dtype)
    pack(elements, what, memoryview(payload))
    return bytes(payload)


def normal(what: PayloadDescription, seed: int = 0) -> np.ndarray:
    """As KV is: channels with means and spreads of their own, some of them moving slowly along the tokens."""
    source = np.random.default_rng(seed)
    shape = kv_shape(what)
    channels = (shape[0], 2, 1, *shape[3:])
    spreads = np.exp(source.normal(size=channels))
    values = source.normal(size=shape)
    slow = values.cumsum(axis=2) / 4
    return source.normal(size=channels) + spreads * np.where(source.random(channels) < 0.3, slow, values)


def round_trip(codec: Codec, payload: bytes, what: PayloadDescription) -> tuple[bytes, int]:
    into = bytearray(codec.max_encoded_bytes(what))
    size = codec.encode(memoryview(payload), what, memoryview(into))
    decoded = bytearray(b"\xa5" * what.payload_bytes)
    codec.decode(memoryview(into)[:size], what, codec.parameters, memoryview(decoded))
    return bytes(decoded), size


def check_close(codec: CacheGenCodec, payload: bytes, decoded: bytes, what: PayloadDescription) -> None:
    """No number is further off than half a step and the rounding of its type; the first token is as it was."""
    before, after = numbers_of(payload, what), numbers_of(decoded, what)
    if not np.isfinite(before).all():
        assert decoded == payload
        return
    first = int(what.first_token == 0 and what.num_tokens > 1)
    assert np.array_equal(before[:, :, :first], after[:, :, :first])
    rest = before[:, :, first:]
    if not rest.size:
        return
    heads = rest.std(axis=2, keepdims=True) ** 2
    spread = np.sqrt(heads.mean(axis=4, keepdims=True))
    widest = (rest.max(2, keepdims=True) - rest.min(2, keepdims=True)).max(4, keepdims=True)
    farthest = np.abs(rest).max(axis=(2, 4), keepdims=True)
    share = max(max(of) for of in msgspec.structs.astuple(LEVELS[codec.parameters.partition(",")[2]]))
    step = np.maximum(share * spread, np.maximum(widest / 127, farthest / 32_000))
    precision = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-20}[what.dtype]
    allowed = 0.51 * step + 1.5 * precision * farthest + 1e-37
    assert (np.abs(after[:, :, first:] - rest) <= allowed).all()


class TestCacheGenContract(KVCodecContract):
    tolerance = 0.02

    def make_codec(self) -> Codec:
        return CacheGenCodec()


@settings(max_examples=60, deadline=None)
@given(
    level=st.sampled_from(LEVEL_NAMES),
    order=st.sampled_from(PAGE_ORDERS),
    dtype=st.sampled_from([*ELEMENTS]),
    num_tokens=st.integers(1, 130),
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    first_token=st.sampled_from([0, 64]),
    seed=st.integers(0, 1000),
)
def test_what_comes_back_is_within_half_a_step(
    level: str, order: str, dtype: str, num_tokens: int, layers: int, heads: int, first_token: int, seed: int
) -> None:
    """Tails and single tokens, every order of a page, every type."""
    what = describe_kv(num_tokens, dtype, order=order, layers=layers, heads=heads, dims=8)
    what = msgspec.structs.replace(what, first_token=first_token)
    codec = CacheGenCodec(CacheGenOptions(level=level))
    payload = payload_of(normal(what, seed), what)
    decoded, size = round_trip(codec, payload, what)
    assert size <= what.payload_bytes
    check_close(codec, payload, decoded, what)


@pytest.mark.parametrize("dtype", [*ELEMENTS])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1e4])
def test_numbers_of_any_size(dtype: str, scale: float) -> None:
    """Zeros, constants, tiny and large numbers, and channels that stick out."""
    what = describe_kv(64, dtype)
    numbers = normal(what) * scale
    numbers[0, 0] = 5.0
    numbers[0, 1, :, 0, :3] *= 6.0
    payload = payload_of(numbers, what)
    codec = CacheGenCodec()
    decoded, size = round_trip(codec, payload, what)
    assert size < what.payload_bytes / 2
    check_close(codec, payload, decoded, what)


def test_levels_differ_in_size_and_loss_and_any_reads_any() -> None:
    what = msgspec.structs.replace(describe_kv(256, heads=3, dims=64, layers=6), first_token=256)
    payload = payload_of(normal(what), what)
    sizes, losses = [], []
    for level in LEVEL_NAMES:
        codec = CacheGenCodec(CacheGenOptions(level=level))
        into = bytearray(what.payload_bytes)
        size = codec.encode(memoryview(payload), what, memoryview(into))
        decoded = bytearray(what.payload_bytes)
        CacheGenCodec().decode(memoryview(into)[:size], what, codec.parameters, memoryview(decoded))
        sizes.append(what.payload_bytes / size)
        losses.append(np.abs(numbers_of(bytes(decoded), what) - numbers_of(payload, what)).mean())
    assert LEVEL_NAMES == ["high", "medium", "low"]
    assert 3 < sizes[0] < sizes[1] < sizes[2]
    assert losses[0] < losses[1] < losses[2]


def test_slow_channels_take_fewer_bits_than_their_spread_says() -> None:
    what = msgspec.structs.replace(describe_kv(256, dims=64), first_token=256)
    source = np.random.default_rng(1)
    noise = source.normal(size=kv_shape(what))
    slow = noise.cumsum(axis=2)
    slow *= noise.std() / slow.std(axis=2, keepdims=True)
    codec = CacheGenCodec()
    sizes = [round_trip(codec, payload_of(numbers, what), what)[1] for numbers in (noise, slow)]
    assert sizes[1] < 0.7 * sizes[0]


def test_parts_that_lie_are_corrupt() -> None:
    what = describe_kv(64)
    codec = CacheGenCodec()
    into = bytearray(what.payload_bytes)
    size = codec.encode(memoryview(payload_of(normal(what), what)), what, memoryview(into))
    encoded = bytes(into[:size])
    described, coded = struct.unpack_from("<II", encoded)
    for lie in (
        (described + 1, coded - 1),
        (coded, described),
        (0, described + coded),
        (2**32 - 1, 2**32 - 1),
    ):
        with pytest.raises(FrameError) as caught:
            codec.decode(
                memoryview(struct.pack("<II", *lie) + encoded[8:]), what, "v1,medium", memoryview(into)
            )
        assert caught.value.reason == MissReason.CORRUPT


def test_levels_are_spelled_as_options() -> None:
    assert open_codec("cachegen").parameters == "v1,medium"
    assert open_codec("cachegen:high").parameters == "v1,high"
    assert open_codec("cachegen:level=low").parameters == "v1,low"
    with pytest.raises(ConfigError, match="level 'best': expected high, low, medium"):
        open_codec("cachegen:best")
