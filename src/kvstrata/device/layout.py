"""KV tensors of an inference engine -> where the pages lie in memory.

vLLM (0.32) hands out one tensor per layer, logically ``[blocks, heads, tokens, content]``, whose strides
say how it lies in memory: heads or tokens first, layers packed block by block into one tensor, pages padded
at their end, blocks split into smaller kernel blocks. Here a page is found from shape and strides alone: the
block dimension must be the outermost one of the layer, and what remains must be dense. Every other
arrangement is refused with :class:`~kvstrata.errors.LayoutError`, at start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvstrata.device.unpack import PageReader
from kvstrata.errors import LayoutError
from kvstrata.types import KVLayout, PageFormat


@dataclass(frozen=True)
class LayerPages:
    """The pages of one layer: block ``b`` has ``page_bytes`` bytes at ``address + b * stride_bytes``."""

    address: int
    stride_bytes: int
    page_bytes: int

    @property
    def is_contiguous(self) -> bool:
        """Whether the pages of consecutive blocks touch."""
        return self.stride_bytes == self.page_bytes


@dataclass(frozen=True)
class DevicePages:
    """All pages of one worker, and the tensors that keep them alive."""

    layout: KVLayout
    num_blocks: int
    layers: tuple[LayerPages, ...]
    tensors: tuple[torch.Tensor, ...]
    """Per layer the tensor that the pages were found in."""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


@dataclass(frozen=True)
class _Page:
    """Sizes and strides of one page's dimensions, in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        order = sorted(range(len(self.sizes)), key=lambda dim: -self.strides[dim])
        return f"page {'x'.join(map(str, self.sizes))} order {','.join(map(str, order))}"


def find_pages(
    kv_caches: Mapping[str, torch.Tensor],
    *,
    num_blocks: int,
    block_size: int,
    kernel: str,
    reader: PageReader | str = "",
) -> DevicePages:
    """Find the pages of every layer.

    Args:
        kv_caches: per layer name its KV tensor, in layer order. Layers that share another layer's tensor
            are counted once.
        num_blocks: blocks that the inference engine addresses.
        block_size: tokens per block.
        kernel: what else decides the meaning of a page's bytes (attention backend, its packing, scales).
        reader: tells how a page unpacks into keys and values; or why that is not known.

    Raises:
        LayoutError: the tensors lie in a way that cannot be copied page by page.
    """
    if not kv_caches:
        raise LayoutError("the inference engine registered no KV tensors")
    layers: list[LayerPages] = []
    tensors: list[torch.Tensor] = []
    found: list[_Page] = []
    for name, tensor in kv_caches.items():
        pages, page = _layer_pages(name, tensor, num_blocks)
        if pages in layers:
            continue
        layers.append(pages)
        tensors.append(tensor)
        found.append(page)
    _check_one({t.dtype for t in tensors}, "element types")
    _check_one({t.device for t in tensors}, "devices")
    _check_disjoint(layers, num_blocks)
    formats = [str(page) for page in found]
    distinct = sorted(set(formats))
    order = "" if len(distinct) == 1 else "".join(f" {distinct.index(text)}" for text in formats)
    layout = KVLayout(
        block_size=block_size,
        page_bytes=tuple(layer.page_bytes for layer in layers),
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        kernel_format=f"{kernel} {' | '.join(distinct)}{order}",
        pages=_page_format(found, tensors[0].dtype, reader),
    )
    return DevicePages(layout, num_blocks, tuple(layers), tuple(tensors))


def _page_format(found: Sequence[_Page], dtype: torch.dtype, reader: PageReader | str) -> PageFormat | str:
    if isinstance(reader, str):
        return reader
    if len(set(found)) > 1:
        return "its layers have pages of several shapes"
    return reader(dtype, found[0].sizes, found[0].strides)


def _check_one(values: set[torch.dtype] | set[torch.device], what: str) -> None:
    if len(values) != 1:
        raise LayoutError(f"KV tensors of several {what}: {sorted(str(value) for value in values)}")


def _layer_pages(name: str, tensor: torch.Tensor, num_blocks: int) -> tuple[LayerPages, _Page]:
    """The pages of one layer and how elements are ordered inside of each."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    if tensor.dim() < 2 or num_blocks < 1 or tensor.numel() == 0:
        raise LayoutError(f"layer {name}: a KV tensor of shape {shape} has no pages")
    if shape[0] != num_blocks and shape[0] % num_blocks == 0:
        # Blocks are split into equal kernel blocks: group them, as vLLM's group_kernel_blocks does.
        ratio = shape[0] // num_blocks
        shape[:1] = [num_blocks, ratio]
        strides[:1] = [strides[0] * ratio, strides[0]]
    candidates = [
        dim
        for dim, size in enumerate(shape)
        if size == num_blocks and _is_dense(_without(shape, dim), _without(strides, dim))
    ]
    if len(candidates) > 1 and num_blocks == 1:
        candidates = candidates[:1]  # with a single block all of them mean the same page
    if len(candidates) != 1:
        raise LayoutError(
            f"layer {name}: no dimension of shape {shape} with strides {strides} separates "
            f"{num_blocks} blocks into contiguous pages"
        )
    (block_dim,) = candidates
    page_shape, page_strides = _without(shape, block_dim), _without(strides, block_dim)
    page_elements = math.prod(page_shape)
    if num_blocks > 1 and strides[block_dim] < page_elements:
        raise LayoutError(f"layer {name}: blocks overlap (shape {shape}, strides {strides})")
    size = tensor.element_size()
    pages = LayerPages(tensor.data_ptr(), strides[block_dim] * size, page_elements * size)
    return pages, _Page(tuple(page_shape), tuple(page_strides))


def _without(values: Sequence[int], index: int) -> list[int]:
    return [value for position, value in enumerate(values) if position != index]


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the dimensions, in some order, fill one contiguous run of elements."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _check_disjoint(layers: Sequence[LayerPages], num_blocks: int) -> None:
    """Refuse layers whose pages share bytes: a copy of one would change the other."""

    def end(layer: LayerPages) -> int:
        return layer.address + (num_blocks - 1) * layer.stride_bytes + layer.page_bytes

    ordered = sorted(layers, key=lambda layer: layer.address)
    for index, first in enumerate(ordered):
        for second in ordered[index + 1 :]:
            if second.address >= end(first):
                continue
            stride = first.stride_bytes
            shift = (second.address - first.address) % stride
            interleaved = first.page_bytes <= shift and shift + second.page_bytes <= stride
            if second.stride_bytes != stride or not interleaved:
                raise LayoutError("the pages of two layers overlap in memory")
