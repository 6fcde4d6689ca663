"""What ``fp8``, ``int8``, ``int4`` share: a payload is taken apart into parts, keys or values of some layers.

Encoded are the payload's tokens; what lies behind the last one is left out, and is zero in what is decoded. A
payload that would be no smaller, one that cannot be taken apart, and one with a number that is not finite or beyond
1e37 is stored as it is, and told by its size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstrata.codecs.base import Codec, PayloadDescription, Stage, corrupt
from kvstrata.codecs.pages import (
    Array,
    copy_elements,
    keys_and_values,
    kv_shape,
    layers_at_once,
    room_tokens,
    to_float32,
    why_opaque,
)
from kvstrata.errors import FrameError, LayoutError
from kvstrata.types import KVLayout, MissReason

_LARGEST = 1e37
"""So that nothing in between leaves the range of float32."""

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.float32]


class Shape(msgspec.Struct, frozen=True):
    """What is to be encoded of a payload."""

    layers: int
    tokens: int
    """Those of the payload, without what fills its last block."""
    heads: int
    dims: int
    dtype: str

    @property
    def elements(self) -> int:
        """Of the keys or the values of a layer."""
        return self.tokens * self.heads * self.dims

    @property
    def layers_at_once(self) -> int:
        """Of a part, at most."""
        return layers_at_once(self.layers, self.elements)

    def parts(self) -> Iterator[Part]:
        """All of it; keys and values of the same layers together, as they lie in the same pages."""
        for first in range(0, self.layers, self.layers_at_once):
            for kind in (0, 1):
                yield Part(kind, slice(first, min(first + self.layers_at_once, self.layers)))


class Part(NamedTuple):
    """Keys (0) or values (1) of some layers."""

    kind: int
    layers: slice


Restore = Callable[[Part, Array], None]
"""Decodes a part into a view of any strides: layers x tokens x heads x dims, or these in more dimensions."""


class Scheme(ABC):
    """How payloads of one shape are quantised by codecs with certain parameters."""

    encoded_bytes: int

    @abstractmethod
    def quantise(self, part: Part, numbers: Numbers, encoded: Bytes) -> None:
        """Encode a part into its places of all. ``numbers`` are layers x tokens x heads x dims, contiguous and
        finite, and may be changed."""

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
        both, room = keys_and_values(into, what), room_tokens(what)
        for part in shape.parts():
            view = both[part.kind][part.layers]
            if room == shape.tokens:
                restore(part, view)
            else:
                blocks = np.zeros((len(view), room, shape.heads, shape.dims), view.dtype)
                restore(part, blocks[:, : shape.tokens])
                copy_elements(blocks.reshape(view.shape), view)


def _shape(what: PayloadDescription) -> Shape:
    layers, _, tokens, heads, dims = kv_shape(what)
    return Shape(layers, tokens, heads, dims, what.dtype)


def _quantise(
    payload: memoryview, what: PayloadDescription, shape: Shape, scheme: Scheme, into: memoryview
) -> bool:
    """False when there are numbers that are too large, or none."""
    encoded = np.frombuffer(into, np.uint8)[: scheme.encoded_bytes]
    both = keys_and_values(payload, what)
    for part in shape.parts():
        view = both[part.kind][part.layers]
        elements = np.empty(view.shape, view.dtype)
        copy_elements(view, elements)
        room = to_float32(elements, what.dtype)
        numbers = room.reshape(len(view), -1, shape.heads, shape.dims)[:, : shape.tokens]
        if not (numbers.max() <= _LARGEST and numbers.min() >= -_LARGEST):  # nor is NaN
            return False
        scheme.quantise(part, np.ascontiguousarray(numbers), encoded)
    return True
