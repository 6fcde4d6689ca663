"""Blocks <-> payloads. A payload is ``[layer][block][page bytes]``, whatever the pages' arrangement."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from kvstrata.device.layout import DevicePages, LayerPages
from kvstrata.errors import LayoutError


class PageCopier(ABC):
    """Copies pages of one worker. Not thread-safe.

    Copies may still be running when ``store`` or ``load`` returns. What the inference engine does with the
    pages afterwards is ordered behind them by the device; a payload must stay as it is until ``wait`` or
    ``ticket`` says so.
    """

    is_synchronous: bool = True
    """Whether device work is complete when the call that starts it returns."""

    def __init__(self, pages: DevicePages) -> None:
        self.pages = pages

    @abstractmethod
    def store(self, block_ids: Sequence[int], payload: memoryview) -> None:
        """Copy the pages of ``block_ids`` into ``payload``, which has room for exactly those."""

    @abstractmethod
    def load(self, payload: memoryview, first: int, block_ids: Sequence[int]) -> None:
        """Copy blocks of ``payload``, from its block ``first`` on, into the pages of ``block_ids``.

        Pages of other blocks are not touched.
        """

    @abstractmethod
    def wait(self) -> None:
        """Return when all copies so far are complete."""

    @abstractmethod
    def ticket(self) -> Callable[[], bool]:
        """A function that tells, without waiting, whether all copies so far are complete."""

    def register(self, pool_id: str, pool: memoryview) -> None:  # noqa: B027 (a CPU needs none)
        """Tell the device that payloads of this pool will come; called once per pool."""

    def _blocks_in(self, payload: memoryview) -> int:
        blocks, rest = divmod(payload.nbytes, self.pages.layout.block_bytes)
        if rest or not payload.contiguous:
            raise ValueError(f"a payload of {payload.nbytes} bytes is not made of whole blocks")
        return blocks

    def _check(self, block_ids: Sequence[int]) -> None:
        """A block id outside of the tensors would make a copy write into foreign memory."""
        if block_ids and not (min(block_ids) >= 0 and max(block_ids) < self.pages.num_blocks):
            raise ValueError(f"block ids {list(block_ids)} are not below {self.pages.num_blocks}")


def make_copier(pages: DevicePages) -> PageCopier:
    """The copier for the device that the pages are on.

    Raises:
        LayoutError: there is none.
    """
    kind = pages.device.type
    if kind == "cpu":
        return CPUCopier(pages)
    if kind == "cuda":
        from kvstrata.device.cuda import CUDACopier  # noqa: PLC0415 (only where there is such a device)

        return CUDACopier(pages)
    raise LayoutError(f"KV tensors on a {kind} device cannot be copied by this version")


class CPUCopier(PageCopier):
    """Raw memory copies. Synchronous; ``ctypes`` releases the GIL while they run.

    Pages of consecutive block ids are copied at once where they touch. One thread: a single core already
    moves 0.8-0.9 of what a plain memcpy of the same bytes does.
    """

    def store(self, block_ids: Sequence[int], payload: memoryview) -> None:
        num_blocks = self._blocks_in(payload)
        if num_blocks != len(block_ids):
            raise ValueError(f"{len(block_ids)} blocks do not fill a payload of {num_blocks} blocks")
        if payload.readonly:
            raise ValueError("the payload is read-only")
        self._check(block_ids)
        runs = _runs(block_ids)
        target = _address(payload)
        for layer in self.pages.layers:
            for position, block, length in runs:
                _copy_run(layer, block, length, target + position * layer.page_bytes, to_pages=False)
            target += num_blocks * layer.page_bytes

    def load(self, payload: memoryview, first: int, block_ids: Sequence[int]) -> None:
        num_blocks = self._blocks_in(payload)
        if first < 0 or first + len(block_ids) > num_blocks:
            raise ValueError(f"blocks {first}..{first + len(block_ids)} are not in a payload of {num_blocks}")
        self._check(block_ids)
        runs = _runs(block_ids)
        source = _address(payload)
        for layer in self.pages.layers:
            for position, block, length in runs:
                start = source + (first + position) * layer.page_bytes
                _copy_run(layer, block, length, start, to_pages=True)
            source += num_blocks * layer.page_bytes

    def wait(self) -> None:
        """Nothing is ever running."""

    def ticket(self) -> Callable[[], bool]:
        """Nothing is ever running."""
        return lambda: True


def _address(payload: memoryview) -> int:
    return int(np.frombuffer(payload, dtype=np.uint8).ctypes.data)


def _runs(block_ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """``(position, first block id, length)`` of each run of consecutive ids."""
    runs: list[tuple[int, int, int]] = []
    for position, block in enumerate(block_ids):
        if runs:
            start, first, length = runs[-1]
            if first + length == block:
                runs[-1] = (start, first, length + 1)
                continue
        runs.append((position, block, 1))
    return runs


def _copy_run(layer: LayerPages, block: int, length: int, payload: int, *, to_pages: bool) -> None:
    """Copy the pages of ``length`` consecutive blocks from or to the address ``payload``."""
    if layer.is_contiguous:
        steps, step_bytes = 1, length * layer.page_bytes
    else:
        steps, step_bytes = length, layer.page_bytes
    page = layer.address + block * layer.stride_bytes
    for _ in range(steps):
        target, source = (page, payload) if to_pages else (payload, page)
        ctypes.memmove(target, source, step_bytes)
        page += layer.stride_bytes
        payload += step_bytes
