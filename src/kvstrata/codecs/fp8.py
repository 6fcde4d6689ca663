"""``fp8``: floats of 8 bits (E4M3FN, OCP 8-bit Floating Point Specification), scaled per layer and head.

Keys and values have scales of their own: the power of two that brings the largest magnitude of a head to 448 or
below. What was decoded is encoded to the same bytes again: passing through several tiers loses no more than one.

Encoded: the exponents of the scales (one signed byte for each part and head), then per part and head the codes of
all tokens and dims.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.codecs.base import check_parameters, corrupt
from kvstrata.codecs.pages import MAX_NUMBER, Array, store_float32
from kvstrata.codecs.quantising import Bytes, Numbers, Part, QuantisingCodec, Restore, Scheme, Shape

_MAX_EXPONENT = 120
"""Of scales: beyond it they leave the range of float32."""
_SHIFT = 20
_FIELDS = np.int32(-0x7810_0000)
"""A code shifted by so many bits has sign, exponent and mantissa where a float32 has them, 0x87F0_0000, once the
copies of the sign are taken away. A multiplication makes up for the exponent, also of what is subnormal: threads
must not flush that. Look-ups in a table for each head take as long on one thread, and wait for Python's lock on
two: 1.2 GB/s, and so 1.8."""
_TOO_SMALL = 120
"""How much less the bias of exponents is in a code than in float32."""
_LARGEST_POWER = 127
"""Of 2, in float32."""


def _values() -> Numbers:
    """What the 256 codes stand for. The two for NaN are not used."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, codes & 7
    normal = np.ldexp(8 + mantissas, exponents - 10)
    positive = np.where(exponents > 0, normal, np.ldexp(mantissas, -9)).astype(np.float32)
    return np.concatenate([positive, -positive])


VALUES = _values()
MAX_VALUE = np.float32(448)


def _codes() -> Bytes:
    """The code nearest to each bfloat16, by its bits; in the middle the even one; 448 for what is larger."""
    bits = np.arange(1 << 15, dtype=np.uint32)
    numbers = np.nan_to_num((bits << 16).view(np.float32), nan=np.inf, posinf=np.inf).clip(max=MAX_VALUE)
    values = VALUES[:127]
    middles = (values[1:] + values[:-1]) / 2
    below, upto = np.searchsorted(middles, numbers, "left"), np.searchsorted(middles, numbers, "right")
    codes = np.where(below % 2 == 0, below, upto).astype(np.uint8)
    return np.concatenate([codes, codes | 0x80])


_CODES = _codes()


class FP8Codec(QuantisingCodec):
    """Half of 16 bits."""

    name: ClassVar[str] = "fp8"

    @property
    def parameters(self) -> str:
        return "v1"

    def check(self, parameters: str) -> None:
        check_parameters(self.name, parameters, self.parameters)

    def scheme(self, shape: Shape, parameters: str) -> Scheme:
        del parameters
        return _FP8(shape)


class _FP8(Scheme):
    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._scales = 2 * shape.layers * shape.heads
        self.encoded_bytes = self._scales + 2 * shape.layers * shape.elements

    def _exponents(self, encoded: Bytes) -> NDArray[np.int8]:
        """Views: layers x keys and values x heads."""
        return encoded[: self._scales].view(np.int8).reshape(self._shape.layers, 2, self._shape.heads)

    def _codes(self, encoded: Bytes) -> Bytes:
        """Views: layers x keys and values x heads x tokens x dims."""
        shape = self._shape
        return encoded[self._scales :].reshape(shape.layers, 2, shape.heads, shape.tokens, shape.dims)

    def quantise(self, part: Part, numbers: Numbers, encoded: Bytes) -> None:
        mantissas, exponents = np.frexp(np.abs(numbers).max(axis=1).max(axis=-1))
        # 448 is 7/8 * 2^9.
        exponents = (exponents - 9 + (mantissas > 7 / 8)).clip(-_MAX_EXPONENT, _MAX_EXPONENT)
        self._exponents(encoded)[part.layers, part.kind] = exponents
        numbers *= np.ldexp(np.float32(1), -exponents)[:, None, :, None]
        self._codes(encoded)[part.layers, part.kind] = _nearest(numbers).transpose(0, 2, 1, 3)

    def restorer(self, encoded: Bytes) -> Restore:
        shape = self._shape
        exponents, all_codes = self._exponents(encoded).astype(np.int32), self._codes(encoded)
        if (np.abs(exponents) > _MAX_EXPONENT).any():
            raise corrupt(FP8Codec.name, "a scale that no head has")
        powers = exponents[..., None, None] + _TOO_SMALL
        first = powers.clip(max=_LARGEST_POWER)
        scales, more = (np.ldexp(np.float32(1), each) for each in (first, powers - first))
        is_large = (powers > _LARGEST_POWER).any()  # without it no number is beyond float16 either
        limit = MAX_NUMBER[shape.dtype]
        room = np.empty((shape.layers_at_once, shape.heads, shape.tokens, shape.dims), np.int32)

        def restore(part: Part, into: Array) -> None:
            at, bits = (part.layers, part.kind), room[: len(into)]
            np.left_shift(all_codes[at].view(np.int8), _SHIFT, out=bits, dtype=np.int32)
            np.bitwise_and(bits, _FIELDS, out=bits)
            numbers = bits.view(np.float32)
            numbers *= scales[at]
            if is_large:
                with np.errstate(over="ignore"):
                    numbers *= more[at]
                np.clip(numbers, -limit, limit, out=numbers)
            store_float32(numbers.transpose(0, 2, 1, 3).reshape(into.shape), shape.dtype, into)

        return restore


def _nearest(numbers: Numbers) -> Bytes:
    """Codes of numbers that are scaled. By way of bfloat16, rounded to odd: so the second rounding is right."""
    bits = numbers.view(np.uint32)
    halves = (bits >> 16).astype(np.uint16)
    halves |= (bits & 0xFFFF) != 0
    return np.take(_CODES, halves, mode="clip")
