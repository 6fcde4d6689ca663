"""The ways in which an inference engine may lay KV tensors out, as vLLM 0.32 makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8)


@dataclass(frozen=True)
class Arrangement:
    """Layers of ``[blocks, heads, tokens, content]``."""

    dtype: torch.dtype
    num_layers: int
    num_blocks: int
    heads: int
    tokens: int
    content: int
    order: str
    """Memory order: L layers, B blocks, H heads, N tokens, C content."""
    padding: int = 0
    """Elements after each page."""
    kernel_ratio: int = 1
    """Kernel blocks per block."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """One view per layer into one allocation, filled with random bytes, padding included."""
        page = self.heads * self.tokens * self.content + self.padding
        total = self.num_layers * self.num_blocks * page
        size = torch.empty(0, dtype=self.dtype).element_size()
        raw = torch.randint(0, 256, (total * size,), dtype=torch.uint8).view(self.dtype)
        sizes = {
            "L": self.num_layers,
            "B": self.num_blocks,
            "H": self.heads,
            "N": self.tokens,
            "C": self.content,
        }
        strides: dict[str, int] = {}
        step = 1
        for position, dim in reversed(list(enumerate(self.order))):
            if self.padding and position == 1:
                step = page  # the page's dimensions lie inside of L and B
            strides[dim] = step
            step *= sizes[dim]
        shape = [self.num_blocks, self.heads, self.tokens, self.content]
        stride = [strides[dim] for dim in "BHNC"]
        if self.kernel_ratio > 1:
            shape[0] *= self.kernel_ratio
            shape[2] //= self.kernel_ratio
            stride[0] //= self.kernel_ratio
        return {
            f"layer.{layer}": raw.as_strided(shape, stride, layer * strides["L"])
            for layer in range(self.num_layers)
        }

    def blocks(self, tensors: dict[str, torch.Tensor], block_ids: list[int]) -> list[torch.Tensor]:
        """Copies of the named blocks' content, per layer, as the engine sees it."""
        ratio = self.kernel_ratio
        rows = [block * ratio + part for block in block_ids for part in range(ratio)]
        return [tensor[rows].flatten().clone().view(torch.uint8) for tensor in tensors.values()]


@st.composite
def arrangements(draw: st.DrawFn) -> Arrangement:
    """Arrangements whose pages are contiguous."""
    order = draw(st.sampled_from(["LBHNC", "LBNHC", "BLHNC", "BLNHC"]))
    # Kernel blocks are made of dense pages, where heads lie inside of tokens.
    ratio = draw(st.sampled_from([1, 1, 2])) if order == "LBNHC" else 1
    return Arrangement(
        dtype=draw(st.sampled_from(DTYPES)),
        num_layers=draw(st.integers(1, 4)),
        num_blocks=draw(st.integers(1, 9)),
        heads=draw(st.integers(1, 4)),
        tokens=draw(st.sampled_from([2, 4, 8])),
        content=draw(st.sampled_from([1, 3, 8])),
        order=order,
        padding=draw(st.sampled_from([0, 0, 5])) if ratio == 1 else 0,
        kernel_ratio=ratio,
    )
