"""What ``fp8``, ``int8``, ``int4`` share: a payload is taken apart into parts, the keys or the values of a layer.

Encoded are the payload's tokens; what lies behind the last one is left out, and is zero in what is decoded. A
payload that would be no smaller, one that cannot be taken apart, and one with a number that is not finite or beyond
1e37 is stored as it is, and told by its size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstrata.codecs.base import Codec, PayloadDescription, Stage, corrupt
from kvstrata.codecs.pages import ELEMENTS, Array, keys_and_values, kv_shape, to_float32, why_opaque
from kvstrata.errors import FrameError, LayoutError
from kvstrata.types import KVLayout, MissReason

_LARGEST = 1e37
"""So that nothing in between leaves the range of float32."""

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float32]


class Shape(msgspec.Struct, frozen=True):
    """What is to be encoded of a payload. Parts are numbered by layer, keys before values."""

    layers: int
    tokens: int
    """Those of the payload, without what fills its last block."""
    heads: int
    dims: int
    dtype: str

    @property
    def num_parts(self) -> int:
        return 2 * self.layers

    @property
    def elements(self) -> int:
        """Of one part."""
        return self.tokens * self.heads * self.dims


Restore = Callable[[int, Array], None]
"""Decodes a part (its number) into tokens x heads x dims elements, which lie tokens by heads."""


class Scheme(ABC):
    """How payloads of one shape are quantised by codecs with certain parameters."""

    encoded_bytes: int

    @abstractmethod
    def quantise(self, index: int, part: Numbers, encoded: Bytes) -> None:
        """Encode a part (its number; tokens x heads x dims, finite; may be changed) into its places of all."""

    @abstractmethod
    def restorer(self, encoded: Bytes) -> Restore:
        """What decodes the parts of this payload.

        Raises:
            FrameError: ``quantise`` did not make these bytes.
        """


class QuantisingCodec(Codec):
    """Keeps less than there was."""

    stage: ClassVar[Stage] = Stage.QUANTISE
    lossless: ClassVar[bool] = False

    @abstractmethod
    def check(self, parameters: str) -> None:
        """Raises FrameError unless frames with these parameters are understood."""

    @abstractmethod
    def scheme(self, shape: Shape, parameters: str) -> Scheme:
        """How frames with these parameters, which are understood, hold such a payload."""

    def why_not(self, layout: KVLayout) -> str:
        return why_opaque(layout)

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        return what.payload_bytes

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        try:
            shape = _shape(what)
        except LayoutError:  # refused when the engine registered; what comes all the same is kept
            shape = None
        if shape is not None:
            scheme = self.scheme(shape, self.parameters)
            if scheme.encoded_bytes < what.payload_bytes and _quantise(payload, what, shape, scheme, into):
                return scheme.encoded_bytes
        into[: what.payload_bytes] = payload
        return what.payload_bytes

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        self.check(parameters)
        if len(encoded) == what.payload_bytes:
            into[:] = encoded
            return
        try:
            shape = _shape(what)
        except LayoutError as error:  # others know how to unpack it
            raise FrameError(MissReason.UNKNOWN_CODEC, str(error)) from None
        scheme = self.scheme(shape, parameters)
        if len(encoded) != scheme.encoded_bytes:
            raise corrupt(self.name, f"{len(encoded)} bytes for a payload of {what.payload_bytes}")
        restore = scheme.restorer(np.frombuffer(encoded, np.uint8))
        room = _room(what, shape)
        for index, view in _parts(into, what):
            restore(index, room[: shape.tokens])
            view[...] = room.reshape(view.shape)


def _shape(what: PayloadDescription) -> Shape:
    layers, _, tokens, heads, dims = kv_shape(what)
    return Shape(layers, tokens, heads, dims, what.dtype)


def _room(what: PayloadDescription, shape: Shape) -> Array:
    """For a part with what fills its last block: tokens x heads x dims, which lie tokens by heads."""
    tokens = what.layout.num_blocks(what.num_tokens) * what.layout.block_size
    return np.zeros((shape.heads, tokens, shape.dims), ELEMENTS[what.dtype]).transpose(1, 0, 2)


def _parts(payload: memoryview, what: PayloadDescription) -> Iterator[tuple[int, Array]]:
    """Numbers and views of all parts."""
    both = keys_and_values(payload, what)
    for index in range(2 * len(what.layout.page_bytes)):
        yield index, both[index % 2][index // 2]


def _quantise(
    payload: memoryview, what: PayloadDescription, shape: Shape, scheme: Scheme, into: memoryview
) -> bool:
    """False when there are numbers that are too large, or none."""
    encoded = np.frombuffer(into, np.uint8)[: scheme.encoded_bytes]
    room = _room(what, shape)
    for index, view in _parts(payload, what):
        room.reshape(view.shape)[...] = view
        part = to_float32(room[: shape.tokens], what.dtype)
        if not np.abs(part).max() <= _LARGEST:  # nor is NaN
            return False
        scheme.quantise(index, part, encoded)
    return True
