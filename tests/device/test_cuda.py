"""The copies of a CUDA device, where there is one."""

from __future__ import annotations

import mmap

import pytest
import torch
from arrangements import Arrangement

from kvstrata.device.copy import make_copier
from kvstrata.device.layout import find_pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="gpu: no CUDA device here"),
]


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC", "BLHNC"])
@pytest.mark.parametrize("pinned", [False, True])
def test_blocks_come_back(order, pinned):
    arrangement = Arrangement(torch.bfloat16, 4, 16, 2, 8, 16, order)
    tensors = {}
    raw = next(iter(arrangement.tensors().values()))
    on_device = torch.tensor([], dtype=raw.dtype).set_(raw.untyped_storage()).cuda()
    for name, tensor in arrangement.tensors().items():
        tensors[name] = on_device.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    pages = find_pages(tensors, num_blocks=16, block_size=8, kernel="TEST")
    copier = make_copier(pages)
    pool = memoryview(mmap.mmap(-1, 1 << 20))
    if pinned:
        copier.register("pool", pool)
    payload = pool[4096 : 4096 + 3 * pages.layout.block_bytes]
    copier.store([5, 6, 2], payload)
    copier.wait()
    expected = [tensor[[6, 2]].clone() for tensor in tensors.values()]
    copier.load(payload, 1, [9, 0])
    done = copier.ticket()
    copier.wait()
    assert done()
    for tensor, want in zip(tensors.values(), expected, strict=True):
        assert torch.equal(tensor[[9, 0]].view(torch.uint8), want.view(torch.uint8))
