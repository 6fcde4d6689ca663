"""Byte planes: the first bytes of all elements, then the second ones ... Shared by ``zstd``, ``lz4``, ``floats``.

The high bytes of floats (sign and exponent) take few values, the low ones (mantissa) are noise. Kept apart, the
former compress and the latter do not spoil it.

Encoded: the size of each packed plane (64 bits each, little-endian), the packed planes in the order of the bytes in
memory, the bytes behind the last whole element. A plane as large as it was is stored as it is. So is a payload:
whatever is not smaller than it was is not encoded at all, and exactly as many bytes as the payload are the payload.
"""

from __future__ import annotations

import itertools
import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstrata.codecs.base import Codec, PayloadDescription, Stage, check_parameters, corrupt

Plane = NDArray[np.uint8]

BLOCK_ELEMENTS = 1 << 18
"""Elements that are split or merged in one step of NumPy: their bytes stay in the L2 cache. With fewer, threads
wait for each other between the steps, for Python's lock: ``floats`` decoded 1.35 GB/s on two threads with 2^15, and
2.2 with 2^18."""


class PlaneCodec(Codec):
    """A codec that packs byte planes, each by itself."""

    stage: ClassVar[Stage] = Stage.COMPRESS

    @property
    def parameters(self) -> str:
        return "v1"

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        return what.payload_bytes

    @abstractmethod
    def pack(self, plane: Plane) -> bytes:
        """The plane, smaller if possible."""

    @abstractmethod
    def unpack(self, packed: memoryview, plane_bytes: int) -> bytes:
        """A plane of ``plane_bytes`` bytes. Allocates nothing before it is sure of the size.

        Raises:
            FrameError: ``pack`` did not make this of such a plane.
        """

    def packs(self, plane: int, element_bytes: int) -> bool:
        """Whether plane number ``plane`` is worth trying."""
        del plane, element_bytes
        return True

    def split(self, payload: memoryview, element_bytes: int) -> list[Plane]:
        """The planes of a payload of whole elements."""
        return split_planes(payload, element_bytes)

    def merge(self, planes: Sequence[Plane], into: memoryview) -> None:
        """What ``split`` took apart."""
        merge_planes(planes, into)

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        size, width = what.payload_bytes, what.element_bytes
        rest = size % width
        parts: list[Any] = []
        for index, plane in enumerate(self.split(payload[: size - rest], width)):
            packed = self.pack(plane) if self.packs(index, width) else plane.data
            parts.append(packed if len(packed) < len(plane) else plane.data)
        sizes = struct.pack(f"<{width}Q", *map(len, parts))
        if len(sizes) + sum(map(len, parts)) + rest >= size:
            into[:size] = payload
            return size
        at = 0
        for part in (sizes, *parts, payload[size - rest :]):
            into[at : at + len(part)] = part
            at += len(part)
        return at

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        check_parameters(self.name, parameters, self.parameters)
        size, width = what.payload_bytes, what.element_bytes
        if len(encoded) == size:
            into[:] = encoded
            return
        rest = size % width
        header = struct.Struct(f"<{width}Q")
        if len(encoded) < header.size:
            raise corrupt(self.name, f"only {len(encoded)} bytes")
        ends = list(itertools.accumulate(header.unpack_from(encoded), initial=header.size))
        if ends[-1] + rest != len(encoded):
            raise corrupt(self.name, "the sizes of the planes do not add up")
        plane_bytes = size // width
        planes = []
        for start, end in itertools.pairwise(ends):
            part = encoded[start:end]
            data = part if len(part) == plane_bytes else self.unpack(part, plane_bytes)
            planes.append(np.frombuffer(data, np.uint8))
        self.merge(planes, into[: size - rest])
        into[size - rest :] = encoded[ends[-1] :]


def split_planes(payload: memoryview, element_bytes: int) -> list[Plane]:
    """The planes of a payload of whole elements, in the order of the bytes in memory."""
    elements = np.frombuffer(payload, np.uint8).reshape(-1, element_bytes)
    if element_bytes == 1:
        return [elements[:, 0]]
    planes = [np.empty(len(elements), np.uint8) for _ in range(element_bytes)]
    for start in range(0, len(elements), BLOCK_ELEMENTS):
        block = elements[start : start + BLOCK_ELEMENTS]
        for index, plane in enumerate(planes):
            plane[start : start + len(block)] = block[:, index]
    return planes


def merge_planes(planes: Sequence[Plane], into: memoryview) -> None:
    """The opposite of :func:`split_planes`."""
    if len(planes) == 2:
        elements = np.frombuffer(into, "<u2")
        for start in range(0, len(elements), BLOCK_ELEMENTS):
            pair = slice(start, start + BLOCK_ELEMENTS)
            merge_pairs(planes[0][pair], planes[1][pair], elements[pair])
        return
    target = np.frombuffer(into, np.uint8).reshape(-1, len(planes))
    for start in range(0, len(target), BLOCK_ELEMENTS):
        block = target[start : start + BLOCK_ELEMENTS]
        for index, plane in enumerate(planes):
            block[:, index] = plane[start : start + len(block)]


def merge_pairs(low: Plane, high: Plane, into: NDArray[np.uint16]) -> None:
    """Low and high bytes to elements of two bytes, by vector instructions: faster than strided copies."""
    np.left_shift(high, 8, out=into, dtype=np.uint16, casting="unsafe")
    np.bitwise_or(into, low, out=into)
