"""``floats``: for KV in bf16 and fp16: exponents entropy-coded, signs and mantissas as they are.

Each element of two bytes is rotated left by one bit, so that the high byte has the whole exponent of a bf16 (its
entropy is about 3 of 8 bits on KV) and the low byte mantissa and sign, which are noise and stored raw. High bytes
are coded by Zstandard without its search for repetitions: what remains is its Huffman coder, with a new table for
each 128 KiB. Elements of other sizes are split into byte planes of which the highest is coded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import zstandard

from kvstrata.codecs.planes import BLOCK_ELEMENTS, Plane, PlaneCodec, merge_pairs, merge_planes, split_planes
from kvstrata.codecs.zstd import HUFFMAN_ONLY, zstd_unpack


class FloatsCodec(PlaneCodec):
    """Lossless, for any data; made for floats of 16 bits."""

    name: ClassVar[str] = "floats"

    def packs(self, plane: int, element_bytes: int) -> bool:
        return plane == element_bytes - 1

    def pack(self, plane: Plane) -> bytes:
        return zstandard.ZstdCompressor(compression_params=HUFFMAN_ONLY).compress(plane.data)

    def unpack(self, packed: memoryview, plane_bytes: int) -> bytes:
        return zstd_unpack(self.name, packed, plane_bytes)

    def split(self, payload: memoryview, element_bytes: int) -> list[Plane]:
        if element_bytes != 2:
            return split_planes(payload, element_bytes)
        elements = np.frombuffer(payload, "<u2")
        low, high = np.empty(len(elements), np.uint8), np.empty(len(elements), np.uint8)
        for start in range(0, len(elements), BLOCK_ELEMENTS):
            block = elements[start : start + BLOCK_ELEMENTS]
            rotated = block << 1
            rotated |= block >> 15
            split = rotated.view(np.uint8).reshape(-1, 2)
            low[start : start + len(block)] = split[:, 0]
            high[start : start + len(block)] = split[:, 1]
        return [low, high]

    def merge(self, planes: Sequence[Plane], into: memoryview) -> None:
        if len(planes) != 2:
            merge_planes(planes, into)
            return
        low, high = planes
        target = np.frombuffer(into, "<u2")
        scratch = np.empty(min(len(target), BLOCK_ELEMENTS), "<u2")
        for start in range(0, len(target), BLOCK_ELEMENTS):
            block = target[start : start + BLOCK_ELEMENTS]
            right = scratch[: len(block)]
            merge_pairs(low[start : start + len(block)], high[start : start + len(block)], block)
            np.right_shift(block, 1, out=right)
            np.left_shift(block, 15, out=block)
            np.bitwise_or(block, right, out=block)
