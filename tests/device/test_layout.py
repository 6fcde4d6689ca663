from __future__ import annotations

import pytest
import torch
from arrangements import Arrangement, arrangements
from hypothesis import given, settings

from kvstrata.device.layout import find_pages
from kvstrata.errors import LayoutError


def found(tensors, num_blocks=6, block_size=4):
    return find_pages(tensors, num_blocks=num_blocks, block_size=block_size, kernel="TEST/vec")


def plain(**changes):
    values = {
        "dtype": torch.bfloat16,
        "num_layers": 3,
        "num_blocks": 6,
        "heads": 2,
        "tokens": 4,
        "content": 8,
        "order": "LBHNC",
    } | changes
    return Arrangement(**values)


@given(arrangements())
@settings(max_examples=150, deadline=None)
def test_pages_are_found_in_every_arrangement(arrangement):
    tensors = arrangement.tensors()
    pages = found(tensors, arrangement.num_blocks, arrangement.tokens)
    size = torch.empty(0, dtype=arrangement.dtype).element_size()
    page_bytes = arrangement.heads * arrangement.tokens * arrangement.content * size
    assert pages.layout.page_bytes == (page_bytes,) * arrangement.num_layers
    assert pages.layout.block_size == arrangement.tokens
    assert pages.layout.dtype == str(arrangement.dtype).removeprefix("torch.")
    for layer, tensor in zip(pages.layers, tensors.values(), strict=True):
        assert layer.address == tensor.data_ptr()
        if arrangement.num_blocks > 1:
            assert layer.stride_bytes == tensor[arrangement.kernel_ratio].data_ptr() - tensor.data_ptr()


def test_the_fingerprint_tells_what_differs_inside_a_page():
    def fingerprint(kernel="TEST/vec", **changes):
        tensors = plain(**changes).tensors()
        return find_pages(tensors, num_blocks=6, block_size=4, kernel=kernel).layout.fingerprint

    base = fingerprint()
    assert base == fingerprint()
    assert base != fingerprint(order="LBNHC")
    assert base != fingerprint(dtype=torch.float16)
    assert base != fingerprint(heads=4, content=4)
    assert base != fingerprint(num_layers=2)
    assert base != fingerprint(kernel="TEST/amx")


def test_the_fingerprint_does_not_tell_what_differs_outside_of_pages():
    def fingerprint(num_blocks=6, **changes):
        tensors = plain(num_blocks=num_blocks, **changes).tensors()
        return find_pages(tensors, num_blocks=num_blocks, block_size=4, kernel="TEST/vec").layout.fingerprint

    assert fingerprint() == fingerprint(order="BLHNC") == fingerprint(padding=5) == fingerprint(num_blocks=9)


def test_layers_that_share_a_tensor_count_once():
    tensors = plain().tensors()
    tensors["layer.9"] = tensors["layer.1"]
    assert len(found(tensors).layers) == 3


def test_layers_of_several_page_sizes():
    small, large = plain(num_layers=1).tensors(), plain(num_layers=1, heads=3).tensors()
    pages = found({"a": small["layer.0"], "b": large["layer.0"]})
    assert pages.layout.page_bytes == (2 * 4 * 8 * 2, 3 * 4 * 8 * 2)
    assert (
        pages.layout.fingerprint != found({"a": large["layer.0"], "b": small["layer.0"]}).layout.fingerprint
    )


def test_the_block_dimension_may_have_the_size_of_another():
    pages = found(plain(heads=6, tokens=6).tensors())
    assert pages.layout.page_bytes[0] == 6 * 6 * 8 * 2


@pytest.mark.parametrize("order", ["LHBNC", "BHLNC"])
def test_pages_in_pieces_are_refused(order):
    with pytest.raises(LayoutError, match="contiguous pages"):
        found(plain(order=order).tensors())


def test_kernel_blocks_with_gaps_are_refused():
    # Two kernel blocks per block, and another layer's page between them.
    raw = torch.zeros(12, 2, 64)
    with pytest.raises(LayoutError, match="contiguous pages"):
        found({"a": raw[:, 0], "b": raw[:, 1]})


def test_another_number_of_blocks_is_refused():
    with pytest.raises(LayoutError, match="5 blocks"):
        found(plain().tensors(), num_blocks=5)


def test_blocks_that_overlap_are_refused():
    raw = torch.zeros(1000)
    with pytest.raises(LayoutError, match="overlap"):
        found({"a": raw.as_strided((6, 4, 8), (16, 8, 1))})


def test_layers_that_overlap_are_refused():
    raw = torch.zeros(6 * 32 + 8)
    with pytest.raises(LayoutError, match="overlap"):
        found({"a": raw[:192].view(6, 32), "b": raw[8:].view(6, 32)})


def test_packed_layers_that_reach_into_the_next_block_are_refused():
    raw = torch.zeros(6 * 64 + 64)
    second = raw.as_strided((6, 32), (64, 1), 48)
    with pytest.raises(LayoutError, match="overlap"):
        found({"a": raw.as_strided((6, 32), (64, 1)), "b": second})


def test_mixed_element_types_are_refused():
    with pytest.raises(LayoutError, match="element types"):
        found({"a": torch.zeros(6, 32), "b": torch.zeros(6, 32, dtype=torch.float16)})


def test_nothing_is_refused():
    with pytest.raises(LayoutError, match="no KV tensors"):
        found({})
    with pytest.raises(LayoutError, match="has no pages"):
        found({"a": torch.zeros(0, 4)})
    with pytest.raises(LayoutError, match="has no pages"):
        found({"a": torch.zeros(6)})
