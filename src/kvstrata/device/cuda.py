"""Blocks <-> payloads on a CUDA device. Reviewed, and covered by tests marked ``gpu``; not run where this was
written, for want of a device.

All copies are issued on the current stream. A load is therefore complete when a later forward pass reads its
pages, and a store that is issued after a pass sees what the pass wrote; no other ordering is needed.
Payloads in a mapped pool are pinned memory once the pool is registered, others are copied synchronously by
the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from kvstrata.device.copy import PageCopier
from kvstrata.device.layout import DevicePages

logger = logging.getLogger(__name__)


class CUDACopier(PageCopier):
    """One transfer per payload, and a gather or scatter per layer on the device."""

    is_synchronous = False

    def __init__(self, pages: DevicePages) -> None:
        super().__init__(pages)
        # All bytes of a page in one row, whatever the dimensions of the tensor.
        self._views = tuple(
            torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
                tensor.untyped_storage(),
                tensor.storage_offset() * tensor.element_size(),
                (pages.num_blocks, layer.page_bytes),
                (layer.stride_bytes, 1),
            )
            for tensor, layer in zip(pages.tensors, pages.layers, strict=True)
        )

    def register(self, pool_id: str, pool: memoryview) -> None:
        """Pin the pool's memory, so that transfers run at full speed and beside the host."""
        host = torch.frombuffer(pool, dtype=torch.uint8)
        error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)
        if int(error) != 0:
            logger.warning("Pool %s cannot be pinned (CUDA error %d): copies are slower", pool_id, int(error))

    def store(self, block_ids: Sequence[int], payload: memoryview) -> None:
        num_blocks = self._blocks_in(payload)
        if num_blocks != len(block_ids):
            raise ValueError(f"{len(block_ids)} blocks do not fill a payload of {num_blocks} blocks")
        self._check(block_ids)
        index = self._index(block_ids)
        staging = torch.empty(payload.nbytes, dtype=torch.uint8, device=self.pages.device)
        start = 0
        for view in self._views:
            part = staging[start : start + num_blocks * view.shape[1]].view(num_blocks, view.shape[1])
            torch.index_select(view, 0, index, out=part)
            start += part.numel()
        torch.frombuffer(payload, dtype=torch.uint8).copy_(staging, non_blocking=True)

    def load(self, payload: memoryview, first: int, block_ids: Sequence[int]) -> None:
        num_blocks = self._blocks_in(payload)
        if first < 0 or first + len(block_ids) > num_blocks:
            raise ValueError(f"blocks {first}..{first + len(block_ids)} are not in a payload of {num_blocks}")
        self._check(block_ids)
        index = self._index(block_ids)
        host = torch.frombuffer(payload, dtype=torch.uint8)
        staging = host.to(self.pages.device, non_blocking=True)
        start = 0
        for view in self._views:
            part = staging[start : start + num_blocks * view.shape[1]].view(num_blocks, view.shape[1])
            view.index_copy_(0, index, part[first : first + len(block_ids)])
            start += part.numel()

    def wait(self) -> None:
        torch.cuda.current_stream(self.pages.device).synchronize()

    def ticket(self) -> Callable[[], bool]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.pages.device))
        return lambda: bool(event.query())

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self.pages.device)
