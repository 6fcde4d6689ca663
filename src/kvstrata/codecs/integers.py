"""``int8`` and ``int4``: integers of a few bits, each group of numbers with a step and a middle of its own.

After KIVI (Liu et al., ICML 2024): keys have channels that are large in all tokens, so a group of keys is one dim
of ``group`` tokens; values have no such channels, and a group is ``group`` dims of one token and head (or the
largest divisor of their number below). Step and middle are bfloat16.

Encoded: per part the steps, then the middles, of all its groups; then per part the codes, in the order of tokens,
heads and dims. Those of ``int4`` are two in a byte: the first half of a part in the lower bits, the second above.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, ClassVar

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from kvstrata.codecs.base import CodecOptions, corrupt
from kvstrata.codecs.pages import (
    MAX_NUMBER,
    Array,
    from_float32,
    store_float32,
    to_float32,
)
from kvstrata.codecs.quantising import Bytes, Numbers, Part, QuantisingCodec, Restore, Scheme, Shape
from kvstrata.errors import FrameError
from kvstrata.types import MissReason

_MIN_GROUP, _MAX_GROUP = 16, 256
_MIN_STEP = np.float32(1e-37)
"""A step below it has no reciprocal; numbers that are that close are taken for one."""
_PARAMETERS = re.compile(r"v1,([0-9]{2,3})")


class IntegerOptions(CodecOptions, frozen=True):
    """Settings of ``int8`` and ``int4``."""

    group: Annotated[int, Meta(ge=_MIN_GROUP, le=_MAX_GROUP)] = 64
    """Numbers that share a step and a middle. A smaller group is more exact, and takes more bytes."""


class IntegerCodec(QuantisingCodec):
    """Codes of :attr:`bits` bits."""

    bits: ClassVar[int]
    Options: ClassVar[type[CodecOptions]] = IntegerOptions

    def __init__(self, options: IntegerOptions | None = None) -> None:
        super().__init__(options)
        self._group = (options or IntegerOptions()).group

    @property
    def parameters(self) -> str:
        return f"v1,{self._group}"

    def check(self, parameters: str) -> None:
        self._group_in(parameters)

    def scheme(self, shape: Shape, parameters: str) -> Scheme:
        return _Integers(shape, self.name, self.bits, self._group_in(parameters))

    def _group_in(self, parameters: str) -> int:
        match = _PARAMETERS.fullmatch(parameters)
        group = int(match[1]) if match else 0
        if not _MIN_GROUP <= group <= _MAX_GROUP:
            raise FrameError(
                MissReason.UNKNOWN_CODEC,
                f"codec {self.name} with parameters {parameters!r} is not known here",
            )
        return group


class Int8Codec(IntegerCodec):
    """Half of 16 bits, and the groups'."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


class Int4Codec(IntegerCodec):
    """A quarter of 16 bits, and the groups'."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


class _Integers(Scheme):
    """Keys or values of a layer are worked on as one or two blocks of rows x a group x columns, contiguous in
    tokens x heads x dims. Groups of keys lie across the tokens, the columns being all heads and dims, and those of
    the last tokens are shorter; for values there is one column."""

    def __init__(self, shape: Shape, name: str, bits: int, group: int) -> None:
        self._shape, self._name, self._bits = shape, name, bits
        width = shape.heads * shape.dims
        whole, rest = divmod(shape.tokens, group)
        of_keys = [(whole, group, width), (1, rest, width)]
        of_values = [(shape.elements // (size := _divisor(shape.dims, group)), size, 1)]
        self._blocks = [block for block in of_keys if math.prod(block)], of_values
        self._groups = [sum(rows * columns for rows, _, columns in blocks) for blocks in self._blocks]
        self._groups_bytes = shape.layers * 4 * sum(self._groups)
        self._codes_bytes = -(-shape.elements * bits // 8)
        self.encoded_bytes = self._groups_bytes + 2 * shape.layers * self._codes_bytes

    def _groups_of(self, encoded: Bytes, part: Part) -> NDArray[np.uint16]:
        """A view of a part's steps and middles: layers x 2 x groups, the bits of bfloat16."""
        of_layers = encoded[: self._groups_bytes].view("<u2").reshape(self._shape.layers, -1)[part.layers]
        keys = 2 * self._groups[0]
        of_kind = of_layers[:, keys:] if part.kind else of_layers[:, :keys]
        return of_kind.reshape(len(of_layers), 2, -1)

    def _codes_of(self, encoded: Bytes, part: Part) -> Bytes:
        """A view of a part's codes: layers x bytes."""
        return encoded[self._groups_bytes :].reshape(self._shape.layers, 2, -1)[part.layers, part.kind]

    def _in_blocks(self, kind: int, numbers: Array, groups: Array) -> Iterator[tuple[Array, Array]]:
        """Views of a part's elements (layers x elements) in blocks, layers x rows x a group x columns, each with
        what its groups have (2 x layers x groups): 2 x layers x rows x 1 x columns."""
        at = group_at = 0
        layers = len(numbers)
        for rows, size, columns in self._blocks[kind]:
            end, group_end = at + rows * size * columns, group_at + rows * columns
            yield (
                numbers[:, at:end].reshape(layers, rows, size, columns),
                groups[:, :, group_at:group_end].reshape(2, layers, rows, 1, columns),
            )
            at, group_at = end, group_end

    def quantise(self, part: Part, numbers: Numbers, encoded: Bytes) -> None:
        top = (1 << self._bits) - 1
        flat = numbers.reshape(len(numbers), -1)
        groups = np.empty((2, len(flat), self._groups[part.kind]), np.float32)
        for block, (steps, middles) in self._in_blocks(part.kind, flat, groups):
            low, high = block.min(axis=2, keepdims=True), block.max(axis=2, keepdims=True)
            middles[...] = _rounded(low / 2 + high / 2)
            steps[...] = _rounded(np.maximum(high - middles, middles - low) / np.float32(top / 2))
            steps[steps < _MIN_STEP] = 0
            np.subtract(block, middles, out=block)
            per_step = np.divide(1, steps, out=np.zeros_like(steps), where=steps > 0)
            np.multiply(block, per_step, out=block)
            np.add(block, np.float32(top / 2), out=block)
        codes = np.rint(flat.clip(0, top, out=flat), out=flat).astype(np.uint8)
        self._groups_of(encoded, part)[...] = from_float32(groups, "bfloat16").transpose(1, 0, 2)
        into = self._codes_of(encoded, part)
        half = into.shape[1]
        into[...] = codes[:, :half]
        if self._bits == 4:
            into[:, : codes.shape[1] - half] |= codes[:, half:] << 4

    def restorer(self, encoded: Bytes) -> Restore:
        shape, top = self._shape, (1 << self._bits) - 1
        all_groups = to_float32(encoded[: self._groups_bytes].view("<u2"), "bfloat16")
        if not np.isfinite(all_groups).all():
            raise corrupt(self._name, "a step or a middle that no group has")
        limit = MAX_NUMBER["float16"]
        room = np.empty((shape.layers_at_once, shape.elements), np.float32)

        def restore(part: Part, into: Array) -> None:
            codes = self._codes_of(encoded, part)
            flat = room[: len(codes)]
            self._unpack(codes, flat)
            stored = self._groups_of(encoded, part).transpose(1, 0, 2)
            steps, middles = groups = to_float32(stored, "bfloat16")
            with np.errstate(over="ignore", invalid="ignore"):
                middles -= steps * np.float32(top / 2)
                for block, (step, lowest) in self._in_blocks(part.kind, flat, groups):
                    np.multiply(block, step, out=block)
                    np.add(block, lowest, out=block)
            if shape.dtype == "float16":  # numbers of other types are far from their limits
                np.clip(flat, -limit, limit, out=flat)
            store_float32(flat.reshape(into.shape), shape.dtype, into)

        return restore

    def _unpack(self, packed: Bytes, into: Numbers) -> None:
        """The codes (layers x bytes) as numbers, layers x elements."""
        half = packed.shape[1]
        if self._bits == 8:
            into[...] = packed
        else:
            into[:, :half] = packed & 15
            into[:, half:] = packed[:, : into.shape[1] - half] >> 4


def _rounded(numbers: Numbers) -> Numbers:
    """To what a bfloat16 can hold."""
    return to_float32(from_float32(numbers, "bfloat16"), "bfloat16")
