"""How pages unpack, read off strides and off kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from arrangements import Arrangement, arrangements
from hypothesis import given, settings

from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.pages import unpack, why_opaque
from kvstrata.device.copy import make_copier
from kvstrata.device.layout import find_pages
from kvstrata.device.unpack import by_kernel, by_strides
from kvstrata.testing.codec import page_format
from kvstrata.types import PageFormat

DENSE = (2, 32, 16), (512, 16, 1)
"""Sizes and strides of a page of 2 heads, 32 tokens, 8 dims."""


@given(arrangements())
@settings(max_examples=80, deadline=None)
def test_plain_pages_unpack_in_every_arrangement(arrangement):
    tensors = arrangement.tensors()
    layout = find_pages(
        tensors,
        num_blocks=arrangement.num_blocks,
        block_size=arrangement.tokens,
        kernel="TEST",
        reader=by_strides,
    )
    if arrangement.content % 2 or arrangement.dtype is torch.uint8:
        assert why_opaque(layout.layout)
        return
    blocks = list(range(arrangement.num_blocks))[::-1][:3]
    num_tokens = len(blocks) * arrangement.tokens
    what = PayloadDescription(
        layout.layout, num_tokens, layout.layout.payload_bytes(num_tokens), layout.layout.dtype
    )
    payload = memoryview(bytearray(what.payload_bytes))
    make_copier(layout).store(blocks, payload)
    unpacked = unpack(payload, what)
    for kv, tensor in zip(unpacked, tensors.values(), strict=True):
        ratio = arrangement.kernel_ratio
        rows = [block * ratio + part for block in blocks for part in range(ratio)]
        expected = tensor[rows].transpose(1, 2).reshape(num_tokens, arrangement.heads, 2, -1)
        expected = expected.permute(2, 0, 1, 3).contiguous().view(torch.uint8).numpy()
        assert np.array_equal(np.ascontiguousarray(kv).view(np.uint8), expected)


def amx(keys, values, page):
    """A kernel that packs pairs of dims of 16 tokens, and pairs of tokens, as matrix instructions want it."""
    tokens, heads, dims = keys.shape
    key_cache, value_cache = page.view(heads, 2 * tokens, dims).chunk(2, dim=1)
    key_cache[:] = keys.view(-1, 16, heads, dims // 2, 2).permute(2, 0, 3, 1, 4).reshape(heads, tokens, dims)
    value_cache[:] = values.view(-1, 2, heads, dims).permute(2, 0, 3, 1).reshape(heads, tokens, dims)


def vec(keys, values, page):
    """A kernel that has keys by dim."""
    heads = keys.shape[1]
    key_cache, value_cache = page.view(heads, 2, -1).unbind(dim=1)
    key_cache[:] = keys.permute(1, 2, 0).reshape(heads, -1)
    value_cache[:] = values.transpose(0, 1).reshape(heads, -1)


@pytest.mark.parametrize("kernel", [amx, vec])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "tokens", "dims"), [(3, 128, 64), (2, 32, 8), (1, 64, 80)])
def test_a_kernels_order_is_read_off(kernel, dtype, heads, tokens, dims):
    strides = (tokens * 2 * dims, 2 * dims, 1)
    expected = page_format(kernel.__name__, tokens, heads, dims)
    found = by_kernel(kernel)(dtype, (heads, tokens, 2 * dims), strides)
    if heads == 1:  # its stride means nothing
        found, expected = (
            str(each).replace(f"((1, {strides[0]}),)", "((1, 0),)") for each in (found, expected)
        )
    assert found == expected


def test_what_a_kernel_does_that_no_strides_describe_is_said():
    def shuffle(keys, values, page):
        both = torch.cat([keys.flatten(), values.flatten()])
        page.view(-1)[:] = both[torch.randperm(len(both), generator=torch.Generator().manual_seed(1))]

    def lose(keys, values, page):
        amx(keys, values, page)
        page[0, 0, 0] = 0

    def refuse(keys, values, page):
        raise RuntimeError("Invalid ISA")

    for kernel, reason in (
        (shuffle, "cannot be described"),
        (lose, "cannot be described"),
        (refuse, "Invalid ISA"),
    ):
        assert reason in by_kernel(kernel)(torch.bfloat16, *DENSE)


@pytest.mark.parametrize(
    ("dtype", "sizes", "strides", "reason"),
    [
        (torch.uint8, *DENSE, "elements are uint8"),
        (torch.float8_e4m3fn, *DENSE, "elements are float8_e4m3fn"),
        (torch.bfloat16, (2, 32, 15), (480, 15, 1), "none of that kernel"),
        (torch.bfloat16, (2, 32, 16), (16, 32, 1), "none of that kernel"),
        (torch.bfloat16, (2, 2, 16, 16), (512, 256, 16, 1), "none of that kernel"),
    ],
)
def test_pages_that_are_not_the_kernels_are_said(dtype, sizes, strides, reason):
    assert reason in by_kernel(amx)(dtype, sizes, strides)


def test_pages_without_keys_and_values_are_said():
    assert "no known place" in by_strides(torch.bfloat16, (32, 16), (16, 1))
    assert "no known place" in by_strides(torch.bfloat16, (2, 32, 15), (480, 15, 1))


def test_layers_that_differ_and_readers_that_do_not_know_are_said():
    def pages(reader, **changes):
        values = {"dtype": torch.bfloat16, "num_layers": 1, "num_blocks": 6, "heads": 2, "tokens": 4}
        each = [
            Arrangement(**(values | {"content": 8, "order": "LBHNC"} | some)).tensors()["layer.0"]
            for some in ({}, changes)
        ]
        tensors = dict(zip("ab", each, strict=True))
        return find_pages(tensors, num_blocks=6, block_size=4, kernel="TEST", reader=reader).layout.pages

    assert isinstance(pages(by_strides), PageFormat)
    assert pages(by_strides, heads=3) == "its layers have pages of several shapes"
    assert pages(by_strides, order="LBNHC") == "its layers have pages of several shapes"
    assert pages("nobody knows") == "nobody knows"
