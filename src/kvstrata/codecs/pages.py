"""Payloads as arrays: ``[layer][block][page]`` <-> layers x 2 x tokens x heads x dims.

Every order of elements that can be described (:class:`~kvstrata.types.PageFormat`) is a matter of strides: an
array with one dimension per digit is a view of the payload, also where a kernel interleaves tokens and dims. A
format that reaches outside of a page, or gives two elements one place, is refused.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.codecs.base import PayloadDescription
from kvstrata.errors import LayoutError
from kvstrata.types import Digits, KVLayout, PageFormat, PageOrder

Array = NDArray[Any]

ELEMENTS: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""What payloads are unpacked to, by the layout's element type. NumPy has no bfloat16: its bits."""
MAX_NUMBER = {
    "bfloat16": np.float32((2 - 2**-7) * 2.0**127),
    "float16": np.float32(65_504),
    "float32": np.finfo(np.float32).max,
}
"""The largest number of each type."""

_MAX_ELEMENTS = 1 << 24
_MAX_DIGITS = 32
"""NumPy's arrays have at most 64 dimensions, and one goes to layers, one to blocks."""
_ELEMENTS_AT_ONCE = 1 << 19
_SHORT_LOOP = 4
"""Elements of an innermost loop that is not worth its beginning."""


def why_opaque(layout: KVLayout) -> str:
    """Why payloads of a layout cannot be unpacked, in one line; empty when they can."""
    return _why_opaque(layout)


@functools.lru_cache(maxsize=256)
def _why_opaque(layout: KVLayout) -> str:
    pages = layout.pages
    if isinstance(pages, str):
        return pages or "the inference engine does not say where keys and values lie in its pages"
    if layout.dtype not in ELEMENTS:
        return f"its elements are {layout.dtype}, not {', '.join(ELEMENTS)}"
    if len(set(layout.page_bytes)) != 1:
        return "its layers have pages of several sizes"
    elements, rest = divmod(layout.page_bytes[0], ELEMENTS[layout.dtype].itemsize)
    shapes = {_shape(pages.keys), _shape(pages.values)}
    tokens, heads, dims = next(iter(shapes))
    if rest or len(shapes) > 1 or tokens != layout.block_size or 2 * tokens * heads * dims != elements:
        return "keys and values as they are described do not fill its pages"
    if elements > _MAX_ELEMENTS:
        return f"its pages have {elements} elements, more than {_MAX_ELEMENTS}"
    orders = (pages.keys, pages.values)
    if any(len(_digits(order)) > _MAX_DIGITS for order in orders):
        return f"its pages are described with more than {_MAX_DIGITS} digits"
    if any(_leads_out(order, elements) for order in orders):
        return "its pages are described with strides that lead out of them"
    used = np.zeros(elements, np.bool_)
    for order in orders:
        used[_offsets(order)] = True
    return "" if used.all() else "its pages are described with strides that overlap"


def _shape(order: PageOrder) -> tuple[int, int, int]:
    tokens, heads, dims = (
        math.prod(size for size, _ in digits) for digits in (order.tokens, order.heads, order.dims)
    )
    return tokens, heads, dims


def _digits(order: PageOrder) -> Digits:
    return (*order.tokens, *order.heads, *order.dims)


def _leads_out(order: PageOrder, elements: int) -> bool:
    digits = _digits(order)
    if order.start < 0 or any(size < 1 or stride < 0 for size, stride in digits):
        return True
    return order.start + sum((size - 1) * stride for size, stride in digits) >= elements


def _offsets(order: PageOrder) -> NDArray[np.int64]:
    offsets = np.array([order.start])
    for size, stride in _digits(order):
        offsets = np.add.outer(offsets, np.arange(size) * stride).ravel()
    return offsets


def page_format(what: PayloadDescription) -> PageFormat:
    """The format of a payload's pages, once it is sure that such a payload can be unpacked.

    Raises:
        LayoutError: it cannot.
    """
    layout = what.layout
    reason = why_opaque(layout)
    if reason or not isinstance(layout.pages, PageFormat):
        raise LayoutError(f"KV of this layout cannot be unpacked: {reason}")
    if what.payload_bytes != layout.payload_bytes(what.num_tokens) or what.dtype != layout.dtype:
        raise LayoutError(
            f"{what.payload_bytes} bytes of {what.dtype} are no payload of {what.num_tokens} tokens"
        )
    return layout.pages


def kv_shape(what: PayloadDescription) -> tuple[int, int, int, int, int]:
    """Layers, 2, tokens, heads, dims. Raises LayoutError as :func:`page_format`."""
    _, heads, dims = _shape(page_format(what).keys)
    return len(what.layout.page_bytes), 2, what.num_tokens, heads, dims


def room_tokens(what: PayloadDescription) -> int:
    """Tokens that the payload's blocks have room for."""
    return what.layout.num_blocks(what.num_tokens) * what.layout.block_size


def keys_and_values(payload: memoryview, what: PayloadDescription) -> tuple[Array, Array]:
    """Views of all keys and of all values of a payload, which may be written through.

    Of each the dimensions are: layer, block, one per digit of the token, of the head, of the dim. The last block
    may have more tokens than the payload; what is there means nothing.

    Raises:
        LayoutError: such a payload cannot be unpacked.
    """
    pages = page_format(what)
    elements = np.frombuffer(payload, ELEMENTS[what.dtype])
    return _strided(elements, pages.keys, what), _strided(elements, pages.values, what)


def _strided(elements: Array, order: PageOrder, what: PayloadDescription) -> Array:
    layers, blocks = len(what.layout.page_bytes), what.layout.num_blocks(what.num_tokens)
    item = elements.itemsize
    page = what.layout.page_bytes[0]
    digits = _digits(order)
    return np.lib.stride_tricks.as_strided(
        elements[order.start :],
        (layers, blocks, *(size for size, _ in digits)),
        (blocks * page, page, *(stride * item for _, stride in digits)),
    )


def unpack(payload: memoryview, what: PayloadDescription) -> Array:
    """A copy of a payload's KV: layers x 2 x tokens x heads x dims, elements as in :data:`ELEMENTS`.

    Raises:
        LayoutError: such a payload cannot be unpacked.
    """
    layers, two, tokens, heads, dims = kv_shape(what)
    kv = np.empty((layers, two, room_tokens(what), heads, dims), ELEMENTS[what.dtype])
    for index, view in enumerate(keys_and_values(payload, what)):
        copy_elements(view, _in_digits(kv, index, view))
    return kv[:, :, :tokens]


def pack(kv: Array, what: PayloadDescription, into: memoryview) -> None:
    """The opposite of :func:`unpack`. Places behind the last token become zero.

    Raises:
        LayoutError: such a payload cannot be packed.
    """
    layers, two, tokens, heads, dims = kv_shape(what)
    if kv.shape != (layers, two, tokens, heads, dims):
        raise LayoutError(f"KV of shape {kv.shape}, expected {(layers, two, tokens, heads, dims)}")
    room = room_tokens(what)
    if room != tokens:
        kv = np.pad(kv, ((0, 0), (0, 0), (0, room - tokens), (0, 0), (0, 0)))
    for index, view in enumerate(keys_and_values(into, what)):
        copy_elements(_in_digits(np.ascontiguousarray(kv), index, view), view)


def _in_digits(kv: Array, index: int, view: Array) -> Array:
    """The keys (0) or values (1) of whole blocks, a view with the dimensions of ``view``."""
    in_digits: Array = kv.reshape(kv.shape[0], 2, *view.shape[1:])[:, index]
    return in_digits


def to_float32(elements: Array, dtype: str) -> NDArray[np.float32]:
    """Elements of the layout's type ``dtype`` as numbers."""
    if dtype != "bfloat16":
        return elements.astype(np.float32)
    return np.left_shift(elements, 16, dtype=np.uint32).view(np.float32)


def from_float32(numbers: NDArray[np.float32], dtype: str) -> Array:
    """Numbers up to :data:`MAX_NUMBER` as elements of type ``dtype``, rounded to the nearest."""
    elements = np.empty(numbers.shape, ELEMENTS[dtype])
    store_float32(numbers.copy(), dtype, elements)
    return elements


def store_float32(numbers: NDArray[np.float32], dtype: str, into: Array) -> None:
    """As :func:`from_float32`, into a view of any strides. ``numbers`` are contiguous and change."""
    if dtype == "bfloat16":
        bits = numbers.view(np.uint32)
        bits += 0x8000
        # The high halves as they lie are copied as fast as they would be shifted out, in one step less.
        copy_elements(numbers.view("<u2").reshape(*numbers.shape, 2)[..., 1], into)
    else:
        copy_elements(numbers, into)


def copy_elements(source: Array, into: Array) -> None:
    """``into[...] = source``, for arrays of one shape, of which one may be a view of pages.

    NumPy's innermost loop is along the smallest stride. Where a kernel keeps pairs together these are two elements,
    and a copy for each of the two takes a third of the time: the pages of vLLM on CPUs with AMX are such.
    """
    for array in (into, source):
        dims = [dim for dim, size in enumerate(array.shape) if size > 1]
        inner = min(dims, key=array.strides.__getitem__, default=0)
        if len(dims) > 1 and array.shape[inner] <= _SHORT_LOOP:
            for index in range(array.shape[inner]):
                at = (slice(None),) * inner + (index,)
                np.copyto(into[at], source[at], casting="same_kind")
            return
    np.copyto(into, source, casting="same_kind")


def layers_at_once(layers: int, elements: int) -> int:
    """How many layers to work on in one step of NumPy, when that has so many elements of each.

    With few elements threads that decode wait for each other between the steps, for Python's lock: ``int4`` decoded
    0.64 GB/s on two threads in steps of 2^16 elements, as on one, and 1.4 in steps of 2^19. As float32 these still
    fit the cache of a core.
    """
    return min(layers, max(1, _ELEMENTS_AT_ONCE // max(1, elements)))
