"""The contract of codecs that want keys and values and keep less than there was, as tests."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import numpy as np
import pytest

from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.pages import Array, from_float32, pack, to_float32, unpack
from kvstrata.errors import FrameError
from kvstrata.testing.codec import PAGE_ORDERS, CodecContract, describe_kv, make_payload
from kvstrata.types import MissReason

_ZERO = 1e-30
_DTYPES = ("bfloat16", "float16", "float32")


def make_kv(what: PayloadDescription, seed: int = 0) -> Array:
    """Elements as ``codecs.pages.pack`` takes them: keys that are large in one dim of each head, as models have."""
    empty = unpack(memoryview(bytes(what.payload_bytes)), what)
    numbers = np.random.default_rng(seed).normal(size=empty.shape).astype(np.float32)
    numbers[:, 0, :, :, 1] += 20
    return from_float32(numbers, what.dtype)


class KVCodecContract(CodecContract):
    """Pages are of one head of 8 dims and 16 tokens, unless a test says other."""

    tolerance: ClassVar[float]
    """How far a number may be off, as a share of the largest one."""

    def describe(
        self, payload_bytes: int, dtype: str = "bfloat16", num_layers: int = 1
    ) -> PayloadDescription:
        """One that unpacks if its size allows that."""
        if dtype in _DTYPES:
            block = describe_kv(16, dtype, block_size=16, layers=num_layers, heads=1, dims=8)
            blocks, rest = divmod(payload_bytes, block.payload_bytes)
            if blocks and not rest:
                return msgspec.structs.replace(block, num_tokens=16 * blocks, payload_bytes=payload_bytes)
        return super().describe(payload_bytes, dtype, num_layers)

    def check_equal(self, decoded: bytes, payload: bytes) -> None:
        """The element type is not known here; :meth:`test_keys_and_values_come_back` looks closer."""
        assert len(decoded) == len(payload)

    def check_near(self, have: Array, want: Array) -> None:
        """As far as the tolerance goes; a number that small may become zero."""
        want = want.astype(np.float64)
        assert np.isfinite(have).all()
        assert np.abs(have - want).max() <= self.tolerance * np.abs(want).max() + _ZERO

    @pytest.mark.parametrize("dtype", _DTYPES)
    @pytest.mark.parametrize("order", PAGE_ORDERS)
    @pytest.mark.parametrize(
        ("tokens", "heads", "dims"), [(200, 3, 64), (1, 2, 80), (33, 1, 32), (64, 8, 128)]
    )
    def test_keys_and_values_come_back(
        self, dtype: str, order: str, tokens: int, heads: int, dims: int
    ) -> None:
        """Also of the last tokens, whatever fills the block behind them; which is zero afterwards."""
        codec = self.make_codec()
        what = describe_kv(tokens, dtype, order=order, heads=heads, dims=dims)
        kv = make_kv(what)
        payload = bytearray(what.payload_bytes)
        pack(kv, what, memoryview(payload))
        room = msgspec.structs.replace(what, num_tokens=-(-tokens // 32) * 32)
        behind = unpack(memoryview(payload), room)
        behind[:, :, tokens:].view(np.uint8)[...] = 0xFF  # NaN of every type
        pack(behind, room, memoryview(payload))
        encoded = self.encode(codec, bytes(payload), what)
        assert len(encoded) < what.payload_bytes
        decoded = memoryview(self.decode(codec, encoded, what.payload_bytes, what))
        self.check_near(to_float32(unpack(decoded, what), dtype), to_float32(kv, dtype))
        assert not unpack(decoded, room)[:, :, tokens:].view(np.uint8).any()

    @pytest.mark.parametrize("dtype", _DTYPES)
    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_stored_as_it_is(self, dtype: str, number: float) -> None:
        """To the byte, all of that chunk."""
        codec = self.make_codec()
        what = describe_kv(50, dtype)
        kv = make_kv(what)
        kv[1, 1, 49, 0, 3] = 0x7FC1 if dtype == "bfloat16" and np.isnan(number) else _element(number, dtype)
        payload = bytearray(what.payload_bytes)
        pack(kv, what, memoryview(payload))
        encoded = self.encode(codec, bytes(payload), what)
        assert self.decode(codec, encoded, what.payload_bytes, what) == payload

    @pytest.mark.parametrize("dtype", _DTYPES)
    def test_the_smallest_and_the_largest_numbers_stay_finite(self, dtype: str) -> None:
        codec = self.make_codec()
        bits = np.dtype("<u4") if dtype == "float32" else np.dtype("<u2")
        first_infinity = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}[dtype]
        top = 1 << (8 * bits.itemsize - 1)
        for patterns in (
            [first_infinity - 1],
            [first_infinity - 1, first_infinity - 1 + top],
            [1, 1 + top],
            [top, 0],
        ):
            what = describe_kv(64, dtype)
            payload = np.resize(np.array(patterns, bits), what.payload_bytes // bits.itemsize).tobytes()
            decoded = self.decode(codec, self.encode(codec, payload, what), what.payload_bytes, what)
            have, want = (to_float32(unpack(memoryview(each), what), dtype) for each in (decoded, payload))
            self.check_near(have, want)

    def test_layouts_without_keys_and_values_are_named_and_kept(self) -> None:
        codec = self.make_codec()
        what = describe_kv(32)
        assert codec.why_not(what.layout) == ""
        for changes, reason in (
            ({"pages": "MLA keeps one latent"}, "MLA keeps"),
            ({"pages": ""}, "does not say"),
            ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
            ({"dtype": "int8"}, "int8"),
        ):
            layout = msgspec.structs.replace(what.layout, **changes)
            assert reason in codec.why_not(layout)
            opaque = msgspec.structs.replace(what, layout=layout, dtype=layout.dtype)
            payload = make_payload(what.payload_bytes, "noise")
            encoded = self.encode(codec, payload, opaque)
            assert self.decode(codec, encoded, what.payload_bytes, opaque) == payload
            quantised = self.encode(codec, make_payload(what.payload_bytes), what)
            with pytest.raises(FrameError) as caught:
                self.decode(codec, quantised, what.payload_bytes, opaque)
            assert caught.value.reason == MissReason.UNKNOWN_CODEC


def _element(number: float, dtype: str) -> float | int:
    if dtype != "bfloat16":
        return number
    return int(np.array(number, np.float32).view(np.uint32)) >> 16
