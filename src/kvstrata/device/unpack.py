"""How a page of an inference engine unpacks into keys and values: read off strides, or off what a kernel writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstrata.types import Digits, PageFormat, PageOrder

PageReader = Callable[[torch.dtype, Sequence[int], Sequence[int]], PageFormat | str]
"""From the element type, sizes and strides of a page (heads, tokens, content; tokens may be split in front of them)
to its format, or to why that is not known."""

KernelWrite = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes keys and values (tokens x heads x dims each) of one block into a page (heads x tokens x content)."""

_BASE = 100
"""Numbers below it are exact in every element type of 16 bits or more."""


def by_strides(dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int]) -> PageFormat | str:
    """The format of pages whose content is a token's keys, then its values, of one head."""
    del dtype
    if not 3 <= len(sizes) <= 4 or sizes[-1] % 2:
        return f"a page of sizes {'x'.join(map(str, sizes))} has no known place for keys and values"
    *split, heads, tokens, content = zip(sizes, strides, strict=True)
    dims = content[0] // 2
    keys = PageOrder(0, (*split, tokens), (heads,), ((dims, content[1]),))
    return PageFormat(keys, PageOrder(dims * content[1], keys.tokens, keys.heads, keys.dims))


def by_kernel(write: KernelWrite) -> PageReader:
    """A reader of pages that only a kernel knows: where the numbers are that it writes into a scratch page."""

    def read(dtype: torch.dtype, sizes: Sequence[int], strides: Sequence[int]) -> PageFormat | str:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            return f"its elements are {str(dtype).removeprefix('torch.')}"
        is_dense = list(strides) == [int(np.prod(sizes[dim + 1 :])) for dim in range(len(sizes))]
        if len(sizes) != 3 or not is_dense or sizes[2] % 2:
            return f"a page of sizes {list(sizes)} and strides {list(strides)} is none of that kernel"
        heads, tokens, content = sizes
        try:
            places = _places(write, dtype, tokens, heads, content // 2)
        except RuntimeError as error:
            return f"the kernel's order of elements cannot be read off: {error}"
        keys, values = (None, None) if places is None else map(_order, places)
        if keys is None or values is None:
            return "the kernel's order of elements cannot be described by strides"
        return PageFormat(keys, values)

    return read


def _places(
    write: KernelWrite, dtype: torch.dtype, tokens: int, heads: int, dims: int
) -> NDArray[np.int64] | None:
    """Where each element of keys and values is: 2 x tokens x heads x dims; None when some are nowhere.

    Every element's number is written digit by digit, each digit small enough for the element type.
    """
    count = 2 * tokens * heads * dims
    numbers = torch.arange(1, count + 1).view(2, tokens, heads, dims)
    found = torch.zeros(count, dtype=torch.int64)
    weight = 1
    while weight <= count:
        page = torch.zeros((heads, tokens, 2 * dims), dtype=dtype)
        keys, values = (numbers // weight % _BASE).to(dtype)
        write(keys, values, page)
        found += page.flatten().to(torch.int64) * weight
        weight *= _BASE
    places = np.full(count + 1, -1)
    places[found.clamp(0, count).numpy()] = np.arange(count)
    return None if (places[1:] < 0).any() else places[1:].reshape(2, tokens, heads, dims)


def _order(places: NDArray[np.int64]) -> PageOrder | None:
    """The strides behind the places of all keys, or values: tokens x heads x dims; None when there are none."""
    start = int(places[0, 0, 0])
    along = [
        _digits(places[:, 0, 0] - start),
        _digits(places[0, :, 0] - start),
        _digits(places[0, 0] - start),
    ]
    tokens, heads, dims = (offsets(digits) for digits in along)
    if not np.array_equal(places, start + tokens[:, None, None] + heads[:, None] + dims):
        return None
    return PageOrder(start, *along)


def _digits(places: NDArray[np.int64]) -> Digits:
    """The digits of an index that has those places, if any has: the shortest run of equal steps, and so on."""
    digits: list[tuple[int, int]] = []
    while len(places) > 1:
        stride = int(places[1])
        steps = np.diff(places)
        run = int(np.argmax(steps != stride)) + 1 if (steps != stride).any() else len(places)
        if len(places) % run or run == 1:
            break
        digits.append((run, stride))
        places = places[::run]
    return tuple(reversed(digits)) or ((1, 0),)


def offsets(digits: Digits) -> NDArray[np.int64]:
    """The offset of every value of an index."""
    result = np.zeros(1, np.int64)
    for size, stride in digits:
        result = (result[:, None] + np.arange(size) * stride).ravel()
    return result
