"""``cachegen``: quantised, each channel modelled, entropy-coded; after the CacheGen paper (Liu et al.,
"CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving", SIGCOMM 2024).

From the paper: early layers get more levels than late ones, keys and values are treated apart, what is coded
are deltas along the tokens of a channel, and channels have probability models of their own. Each head of each
layer has a step, a share of its spread that the level of quality decides. Unlike in the paper,

- a channel's delta is that to its mean over the chunk, or to the token before, whichever is smaller, and not
  that to an anchor token in a group of ten: with the same steps the keys of the small model take 2.7 bits so,
  and 3.1 with anchors;
- channels that are alike share a model, and the coder is Huffman's, in Zstandard: many times as fast as an
  arithmetic coder that takes one symbol at a time.

Encoded: a head (sizes of the last two parts, 32 bits each, little-endian); the first token of the sequence, if
it is among them, as it is; the description of the rows (steps, means, models); the symbols, one byte for each
element, row by row, rows of one model together. The last two are packed by Zstandard. A row is a channel, that
is one dim of a head: layers x 2 x heads x dims rows of as many symbols as there are tokens. What has infinities
or NaNs, or would not get smaller, is stored as it is.
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstrata.codecs.base import Codec, CodecOptions, PayloadDescription, Stage, corrupt
from kvstrata.codecs.pages import (
    ELEMENTS,
    MAX_NUMBER,
    Array,
    copy_elements,
    keys_and_values,
    kv_shape,
    layers_at_once,
    room_tokens,
    store_float32,
    to_float32,
    unpack,
    why_opaque,
)
from kvstrata.codecs.zstd import HUFFMAN_ONLY, zstd_unpack
from kvstrata.errors import FrameError, LayoutError
from kvstrata.types import KVLayout, MissReason

_VERSION = "v1"
_HEAD = struct.Struct("<II")
_PREVIOUS = 0x80
"""In a row's model: its symbols are differences from token to token."""
_MODELS_PER_OCTAVE = 3
_LARGEST = 127
"""Of a quantised number, less its row's mean: it is a signed byte."""
_LARGEST_MEAN = 2**15 - 2
_SMALLEST_STEP = float(np.finfo(np.float32).tiny)
_EXACT_TOKENS = 1
"""So many tokens at the start of a sequence are kept as they are: all later ones attend to the first. On the small
model it saves two thirds of the loss (KL divergence of the next token), and more than one gain nothing."""

Numbers = NDArray[np.float32]


class Steps(msgspec.Struct, frozen=True):
    """Size of a step for each third of the layers, as a share of the spread (standard deviation) of a head."""

    keys: tuple[float, float, float]
    values: tuple[float, float, float]

    def of(self, kind: int, layer: int, num_layers: int) -> float:
        """For keys (0) or values (1) of a layer."""
        return (self.keys, self.values)[kind][3 * layer // num_layers]


LEVELS = {
    "high": Steps(keys=(0.10, 0.10, 0.13), values=(0.14, 0.14, 0.18)),
    "medium": Steps(keys=(0.30, 0.30, 0.40), values=(0.44, 0.44, 0.55)),
    "low": Steps(keys=(0.48, 0.48, 0.64), values=(0.70, 0.70, 0.88)),
}


class CacheGenOptions(CodecOptions, frozen=True):
    """Settings of ``cachegen``."""

    level: Literal["high", "medium", "low"] = "medium"
    """Quality: how fine the steps are."""


class Rows(msgspec.Struct, frozen=True, eq=False):
    """All that is needed besides the symbols, in the order of layers, keys and values, heads, dims."""

    steps: NDArray[np.float32]
    """For each head of each layer's keys and values."""
    means: NDArray[np.int16]
    """For each row: its mean, in steps."""
    models: NDArray[np.uint8]
    """For each row: which model codes it, and :data:`_PREVIOUS`."""

    def pack(self) -> bytes:
        """As they are stored, before compression: means by byte planes."""
        means = self.means.astype("<i2").view(np.uint8).reshape(-1, 2).T
        return b"".join(part.tobytes() for part in (self.steps.astype("<f4"), means, self.models))

    @classmethod
    def unpack(cls, data: bytes, num_heads: int, num_rows: int) -> Rows:
        """The opposite of :meth:`pack`; ``data`` has the right size."""
        steps = np.frombuffer(data, "<f4", num_heads)
        rest = np.frombuffer(data, np.uint8, offset=steps.nbytes)
        means = np.ascontiguousarray(rest[: 2 * num_rows].reshape(2, -1).T).view("<i2").ravel()
        return cls(steps, means, rest[2 * num_rows :])

    @staticmethod
    def packed_bytes(num_heads: int, num_rows: int) -> int:
        return 4 * num_heads + 3 * num_rows

    def order(self) -> NDArray[np.intp]:
        """The rows in the order in which their symbols are stored."""
        return np.argsort(self.models, kind="stable")


class CacheGenCodec(Codec):
    """Lossy, for keys and values of 16 or 32 bits in pages that can be unpacked."""

    name: ClassVar[str] = "cachegen"
    stage: ClassVar[Stage] = Stage.QUANTISE
    lossless: ClassVar[bool] = False
    Options: ClassVar[type[CodecOptions]] = CacheGenOptions

    def __init__(self, options: CacheGenOptions | None = None) -> None:
        super().__init__(options)
        self._level = (options or CacheGenOptions()).level

    @property
    def parameters(self) -> str:
        return f"{_VERSION},{self._level}"

    def why_not(self, layout: KVLayout) -> str:
        return why_opaque(layout)

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        return what.payload_bytes

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        parts = self._parts(payload, what)
        size = sum(map(len, parts))
        if not parts or size >= what.payload_bytes:
            parts, size = [payload], what.payload_bytes
        at = 0
        for part in parts:
            into[at : at + len(part)] = part
            at += len(part)
        return size

    def _parts(self, payload: memoryview, what: PayloadDescription) -> list[Any]:
        """What is stored; empty when there is nothing to quantise, or not only numbers."""
        try:
            kv = unpack(payload, what)
        except LayoutError:  # refused when the engine registered; what comes all the same is kept
            return []
        exact, kv = np.split(kv, [_num_exact(what)], axis=2)
        layers, _, tokens, heads, dims = kv.shape
        if not kv.size:
            return []
        symbols = np.empty((layers, 2, heads, dims, tokens), np.uint8)
        rows = Rows(
            steps=np.empty((layers, 2, heads), np.float32),
            means=np.empty((layers, 2, heads, dims), np.int16),
            models=np.empty((layers, 2, heads, dims), np.uint8),
        )
        steps = LEVELS[self._level]
        for layer, kind in np.ndindex(layers, 2):
            numbers = to_float32(np.ascontiguousarray(kv[layer, kind].transpose(1, 2, 0)), what.dtype)
            if not np.isfinite(numbers).all():
                return []
            at = (layer, kind)
            rows.steps[at] = _steps(numbers, steps.of(kind, layer, layers))
            symbols[at], rows.means[at], rows.models[at] = _symbols(numbers, rows.steps[at])
        flat = Rows(rows.steps.ravel(), rows.means.ravel(), rows.models.ravel())
        sorted_symbols = symbols.reshape(-1, tokens)[flat.order()]
        described = zstandard.ZstdCompressor(level=3).compress(flat.pack())
        coded = zstandard.ZstdCompressor(compression_params=HUFFMAN_ONLY).compress(sorted_symbols.data)
        return [_HEAD.pack(len(described), len(coded)), exact.tobytes(), described, coded]

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        if parameters.partition(",")[0] != _VERSION:
            raise FrameError(
                MissReason.UNKNOWN_CODEC, f"codec cachegen with parameters {parameters!r} is not known here"
            )
        if len(encoded) == what.payload_bytes:
            into[:] = encoded
            return
        try:
            layers, _, tokens, heads, dims = kv_shape(what)
        except LayoutError as error:  # others know how to unpack it
            raise FrameError(MissReason.UNKNOWN_CODEC, str(error)) from None
        num_exact = _num_exact(what)
        exact = np.empty((layers, 2, num_exact, heads, dims), ELEMENTS[what.dtype])
        parts = self._split(encoded, exact.nbytes)
        exact[...] = np.frombuffer(parts[0], exact.dtype).reshape(exact.shape)
        num_heads = layers * 2 * heads
        packed = zstd_unpack(self.name, parts[1], Rows.packed_bytes(num_heads, num_heads * dims))
        rows = Rows.unpack(packed, num_heads, num_heads * dims)
        if not (np.isfinite(rows.steps) & (rows.steps > 0)).all():
            raise corrupt(self.name, "a step is no positive number")
        unpacked = zstd_unpack(self.name, parts[2], num_heads * dims * (tokens - num_exact))
        symbols = np.frombuffer(unpacked, np.uint8).reshape(num_heads * dims, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # steps and means of no right frame
            _fill(into, what, exact, Restorer.of(rows, symbols, what.dtype))

    def _split(self, encoded: memoryview, exact_bytes: int) -> tuple[memoryview, memoryview, memoryview]:
        """The exact tokens, the description of the rows, the symbols."""
        start = _HEAD.size + exact_bytes
        if len(encoded) < start:
            raise corrupt(self.name, f"only {len(encoded)} bytes")
        described, coded = _HEAD.unpack_from(encoded)
        if start + described + coded != len(encoded):
            raise corrupt(self.name, "the sizes of its parts do not add up")
        return encoded[_HEAD.size : start], encoded[start : start + described], encoded[start + described :]


def _fill(into: memoryview, what: PayloadDescription, exact: Array, restorer: Restorer) -> None:
    """Bring everything to its place. Behind the last token all is zero."""
    layers, _, tokens, heads, dims = kv_shape(what)
    num_exact, rows = exact.shape[2], heads * dims
    at_once = layers_at_once(layers, 2 * rows * tokens)
    numbers = np.empty((at_once * 2 * rows, tokens - num_exact), np.float32)
    elements = np.zeros((at_once, 2, room_tokens(what), rows), ELEMENTS[what.dtype])
    targets = keys_and_values(into, what)
    for first in range(0, layers, at_once):
        these = slice(first, min(first + at_once, layers))
        found = elements[: these.stop - first]
        numbers = numbers[: 2 * rows * len(found)]
        restorer.restore(slice(2 * rows * first, 2 * rows * these.stop), numbers)
        by_row = numbers.reshape(len(found), 2, rows, -1)
        store_float32(by_row, what.dtype, found[:, :, num_exact:tokens].transpose(0, 1, 3, 2))
        found[:, :, :num_exact] = exact[these].reshape(len(found), 2, num_exact, rows)
        for kind, target in enumerate(targets):
            copy_elements(found[:, kind].reshape(target[these].shape), target[these])


def _steps(numbers: Numbers, share: float) -> Numbers:
    """The step of each head, for heads x dims x tokens: ``share`` of its spread, or more to fit bytes and means."""
    spread = np.sqrt(numbers.var(axis=2, dtype=np.float64).mean(axis=1))
    low, high = numbers.min(axis=2).astype(np.float64), numbers.max(axis=2).astype(np.float64)
    widest = (high - low).max(axis=1) / _LARGEST
    farthest = np.maximum(-low, high).max(axis=1) / _LARGEST_MEAN
    steps = np.maximum.reduce([share * spread, widest, farthest, np.full(len(spread), _SMALLEST_STEP)])
    as_stored: Numbers = steps.astype(np.float32)
    return as_stored


def _symbols(
    numbers: Numbers, steps: Numbers
) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.uint8]]:
    """Symbols (heads x dims x tokens), means and models (heads x dims) of one layer's keys or values."""
    levels = np.rint(numbers / steps[:, None, None])
    means = np.rint(levels.mean(axis=2, dtype=np.float64)).astype(np.int16)
    levels -= means[:, :, None].astype(np.float32)  # both are integers of less than 24 bits
    symbols = np.clip(levels, -_LARGEST, _LARGEST, out=levels).astype(np.int8)
    from_previous = np.diff(symbols, axis=2, prepend=np.int8(0))
    spreads = [np.abs(each).view(np.uint8).mean(axis=2) for each in (symbols, from_previous)]
    previous = spreads[1] < spreads[0]
    symbols[previous] = from_previous[previous]
    octaves = np.log2(np.minimum(*spreads) + 2.0**-4) + 4
    models = np.rint(_MODELS_PER_OCTAVE * octaves).astype(np.uint8)
    return symbols.view(np.uint8), means, np.where(previous, models | _PREVIOUS, models)


class Restorer(msgspec.Struct, frozen=True):
    """Numbers of some layers' keys and values from symbols."""

    rows: Rows
    symbols: NDArray[np.uint8]
    places: NDArray[np.intp]
    """Where in ``symbols`` each row is."""
    largest: np.float32
    """Number of the element type, which a step may lead beyond."""

    @classmethod
    def of(cls, rows: Rows, symbols: NDArray[np.uint8], dtype: str) -> Restorer:
        places = np.empty(len(rows.models), np.intp)
        places[rows.order()] = np.arange(len(places))
        return cls(rows, symbols, places, MAX_NUMBER[dtype])

    def restore(self, these: slice, into: Numbers) -> None:
        """The rows ``these``, whole heads, into an array of rows x tokens."""
        levels = self.symbols[self.places[these]]
        differences = self.rows.models[these] >= _PREVIOUS
        levels[differences] = np.add.accumulate(levels[differences], axis=1, dtype=np.uint8)
        dims = len(self.rows.models) // len(self.rows.steps)
        steps = np.repeat(self.rows.steps[these.start // dims : these.stop // dims], dims)
        np.multiply(levels.view(np.int8), steps[:, None], out=into)
        means = self.rows.means[these] * steps
        np.add(into, means[:, None], out=into)
        if not (np.abs(means) + (_LARGEST + 1) * steps < self.largest).all():
            np.clip(into, -self.largest, self.largest, out=into)


def _num_exact(what: PayloadDescription) -> int:
    """How many tokens of a payload are kept as they are: not all, one alone is as good as exact anyway."""
    return max(0, min(what.num_tokens - 1, _EXACT_TOKENS - what.first_token))
