from __future__ import annotations

import pytest
import torch
from arrangements import Arrangement, arrangements
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.device.copy import CPUCopier, make_copier
from kvstrata.device.cuda import CUDACopier
from kvstrata.device.layout import find_pages
from kvstrata.errors import LayoutError


def copier_for(arrangement, tensors, kind=CPUCopier):
    pages = find_pages(
        tensors, num_blocks=arrangement.num_blocks, block_size=arrangement.tokens, kernel="TEST/vec"
    )
    return kind(pages)


def payload_for(copier, num_blocks):
    # Guard bytes on both sides: a copy that misses its place is seen.
    size = copier.pages.layout.block_bytes * num_blocks
    whole = bytearray(b"\xee" * (size + 128))
    return whole, memoryview(whole)[64 : 64 + size]


def guards(whole):
    return bytes(whole[:64]), bytes(whole[-64:])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("kind", [CPUCopier, CUDACopier])
@given(arrangement=arrangements(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_blocks_come_back_in_other_blocks_and_nothing_else_changes(kind, arrangement, data):
    # The gathers and scatters of CUDA's copier run on any device; its streams need the real one.
    block_ids = st.lists(st.integers(0, arrangement.num_blocks - 1), unique=True, min_size=1)
    sources = data.draw(block_ids, "sources")
    source_tensors, target_tensors = arrangement.tensors(), arrangement.tensors()
    store = copier_for(arrangement, source_tensors, kind)
    load = copier_for(arrangement, target_tensors, kind)
    whole, payload = payload_for(store, len(sources))
    store.store(sources, payload)
    assert guards(whole) == (b"\xee" * 64, b"\xee" * 64)

    first = data.draw(st.integers(0, len(sources) - 1), "first")
    targets = data.draw(block_ids.filter(lambda ids: len(ids) <= len(sources) - first), "targets")
    others = [block for block in range(arrangement.num_blocks) if block not in targets]
    before = arrangement.blocks(target_tensors, others)
    load.load(payload, first, targets)

    expected = arrangement.blocks(source_tensors, sources[first : first + len(targets)])
    for left, right in zip(arrangement.blocks(target_tensors, targets), expected, strict=True):
        assert torch.equal(left, right)
    for left, right in zip(arrangement.blocks(target_tensors, others), before, strict=True):
        assert torch.equal(left, right)


@given(arrangements())
@settings(max_examples=50, deadline=None)
def test_memory_between_the_pages_stays_as_it_is(arrangement):
    tensors = arrangement.tensors()
    copier = copier_for(arrangement, tensors)
    ids = list(range(arrangement.num_blocks))
    _, payload = payload_for(copier, len(ids))
    storage = next(iter(tensors.values())).untyped_storage()
    raw = torch.tensor([], dtype=torch.uint8).set_(storage)
    before = raw.clone()
    copier.store(ids, payload)
    assert torch.equal(raw, before)
    copier.load(payload, 0, ids)
    assert torch.equal(raw, before)


def test_a_payload_is_layer_by_layer_and_block_by_block():
    arrangement = Arrangement(torch.uint8, 2, 4, 1, 2, 3, "BLHNC", padding=1)
    tensors = arrangement.tensors()
    copier = copier_for(arrangement, tensors)
    _, payload = payload_for(copier, 2)
    copier.store([3, 1], payload)
    expected = b"".join(
        bytes(tensors[f"layer.{layer}"][block].flatten().tolist()) for layer in (0, 1) for block in (3, 1)
    )
    assert bytes(payload) == expected


def test_what_does_not_fit_is_refused():
    arrangement = Arrangement(torch.uint8, 1, 4, 1, 2, 3, "LBHNC")
    copier = copier_for(arrangement, arrangement.tensors())
    _, payload = payload_for(copier, 2)
    with pytest.raises(ValueError, match="do not fill"):
        copier.store([1], payload)
    with pytest.raises(ValueError, match="not below 4"):
        copier.store([1, 4], payload)
    with pytest.raises(ValueError, match="not below 4"):
        copier.load(payload, 0, [-1])
    with pytest.raises(ValueError, match="not in a payload"):
        copier.load(payload, 1, [1, 2])
    with pytest.raises(ValueError, match="whole blocks"):
        copier.load(payload[:-1], 0, [1])
    with pytest.raises(ValueError, match="read-only"):
        copier.store([1, 2], payload.toreadonly())


def test_loading_from_a_read_only_payload():
    arrangement = Arrangement(torch.uint8, 1, 4, 1, 2, 3, "LBHNC")
    tensors = arrangement.tensors()
    copier = copier_for(arrangement, tensors)
    copier.load(memoryview(bytes(range(6))), 0, [2])
    assert tensors["layer.0"][2].flatten().tolist() == list(range(6))


def test_other_devices_are_refused():
    pages = find_pages({"a": torch.zeros(4, 8, device="meta")}, num_blocks=4, block_size=2, kernel="TEST")
    with pytest.raises(LayoutError, match="meta device"):
        make_copier(pages)
