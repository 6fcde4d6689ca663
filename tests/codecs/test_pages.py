"""Payloads as arrays."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.codecs.pages import (
    ELEMENTS,
    MAX_NUMBER,
    copy_elements,
    from_float32,
    kv_shape,
    pack,
    to_float32,
    unpack,
    why_opaque,
)
from kvstrata.errors import LayoutError
from kvstrata.testing.codec import PAGE_ORDERS, describe_kv
from kvstrata.types import PageFormat

orders = pytest.mark.parametrize("order", PAGE_ORDERS)


def places(what: Any) -> Any:
    """Where each element of a page is, by the definition: 2 x tokens x heads x dims."""
    layout = what.layout
    _, _, _, heads, dims = kv_shape(what)
    result = np.zeros((2, layout.block_size, heads, dims), np.int64)
    for index in np.ndindex(result.shape):
        order = (layout.pages.keys, layout.pages.values)[index[0]]
        at = order.start
        for number, digits in zip(index[1:], (order.tokens, order.heads, order.dims), strict=True):
            rest = number
            for size, stride in reversed(digits):
                at += rest % size * stride
                rest //= size
        result[index] = at
    return result


@orders
def test_elements_are_where_the_digits_say(order: str) -> None:
    what = describe_kv(70, order=order, layers=3, heads=2, dims=4)
    elements = np.random.default_rng(1).integers(0, 1 << 16, what.payload_bytes // 2, dtype=np.uint16)
    pages = elements.reshape(3, 3, -1)  # layers, blocks
    expected = pages[:, :, places(what)]  # layers, blocks, 2, tokens, heads, dims
    expected = np.moveaxis(expected, 2, 1).reshape(3, 2, 96, 2, 4)[:, :, :70]
    assert np.array_equal(unpack(memoryview(elements.tobytes()), what), expected)


@given(
    order=st.sampled_from(PAGE_ORDERS),
    dtype=st.sampled_from([*ELEMENTS]),
    num_tokens=st.integers(1, 130),
    heads=st.integers(1, 3),
    layers=st.integers(1, 3),
)
def test_what_was_unpacked_is_packed(
    order: str, dtype: str, num_tokens: int, heads: int, layers: int
) -> None:
    what = describe_kv(num_tokens, dtype, order=order, heads=heads, layers=layers, dims=6)
    source = np.random.default_rng(num_tokens).bytes(what.payload_bytes)
    kv = unpack(memoryview(source), what)
    assert kv.shape == kv_shape(what) == (layers, 2, num_tokens, heads, 6)
    into = bytearray(b"\xa5" * what.payload_bytes)
    pack(kv, what, memoryview(into))
    again = unpack(memoryview(into), what)
    assert again.tobytes() == kv.tobytes()
    if num_tokens % 32 == 0:
        assert into == source
    else:
        room = msgspec.structs.replace(what, num_tokens=-(-num_tokens // 32) * 32)
        assert not unpack(memoryview(into), room)[:, :, num_tokens:].view(np.uint8).any()


@orders
def test_bits_survive_at_odd_addresses(order: str) -> None:
    """NaNs keep their bits, and slots need not be aligned to elements."""
    what = describe_kv(32, order=order)
    source = memoryview(b"x" + bytes(range(256)) * (what.payload_bytes // 256))[1:]
    into = memoryview(bytearray(what.payload_bytes + 3))
    pack(unpack(source, what), what, into[3:])
    assert into[3:] == source


@given(
    sizes=st.lists(st.integers(0, 5), max_size=4).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.permutations(range(len(sizes))))
    ),
    casts=st.booleans(),
)
def test_elements_are_copied_in_any_order(sizes: tuple[list[int], list[int]], casts: bool) -> None:
    shape, order = sizes
    source = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    into = np.zeros([shape[dim] for dim in order], np.float16 if casts else np.float32)
    view = into.transpose(np.argsort(order))
    copy_elements(source, view)
    assert np.array_equal(view, source.astype(into.dtype))
    back = np.zeros_like(source)
    copy_elements(view, back)
    assert np.array_equal(back, view)


def change(**changes: Any) -> Any:
    """A layout whose keys are described differently."""
    layout = describe_kv(32).layout
    assert isinstance(layout.pages, PageFormat)
    keys = msgspec.structs.replace(layout.pages.keys, **changes)
    return msgspec.structs.replace(layout, pages=msgspec.structs.replace(layout.pages, keys=keys))


def huge() -> Any:
    """A page of 8 GiB, of which nothing is allocated."""
    layout = describe_kv(32 << 20, block_size=32 << 20).layout
    assert layout.page_bytes[0] >= 1 << 32
    return layout


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (msgspec.structs.replace(describe_kv(32).layout, pages=""), "does not say"),
        (msgspec.structs.replace(describe_kv(32).layout, pages="MLA keeps"), "MLA keeps"),
        (msgspec.structs.replace(describe_kv(32).layout, dtype="uint8"), "its elements are uint8"),
        (msgspec.structs.replace(describe_kv(32).layout, page_bytes=(8192, 4096)), "several sizes"),
        (msgspec.structs.replace(describe_kv(32).layout, page_bytes=(8190, 8190)), "do not fill"),
        (msgspec.structs.replace(describe_kv(32).layout, block_size=16), "do not fill"),
        (change(tokens=((16, 64),)), "do not fill"),
        (change(dims=((33, 1),)), "do not fill"),
        (change(dims=((32, 2),)), "overlap"),
        (change(dims=((32, 0),)), "overlap"),
        (change(start=32), "overlap"),
        (change(tokens=((32, -64),)), "lead out"),
        (change(start=-1), "lead out"),
        (change(start=33), "lead out"),
        (change(heads=((2, 1 << 40),)), "lead out"),
        (change(tokens=((-1, 1), (-32, 64))), "lead out"),
        (huge(), "more than"),
        (change(tokens=((1, 0),) * 70 + ((32, 64),)), "digits"),
    ],
)
def test_what_cannot_be_unpacked_is_refused_with_the_reason(layout: Any, reason: str) -> None:
    assert reason in why_opaque(layout)
    what = msgspec.structs.replace(describe_kv(32), layout=layout, dtype=layout.dtype)
    with pytest.raises(LayoutError, match=reason):
        unpack(memoryview(bytes(100)), what)


def test_a_payload_of_another_size_is_refused() -> None:
    what = describe_kv(33)
    for payload_bytes in (what.payload_bytes - 1, what.payload_bytes // 2, 0):
        wrong = msgspec.structs.replace(what, payload_bytes=payload_bytes)
        with pytest.raises(LayoutError, match="no payload of 33 tokens"):
            unpack(memoryview(bytes(payload_bytes)), wrong)
    with pytest.raises(LayoutError, match="expected"):
        pack(np.zeros((1, 2, 33, 2, 32), np.uint16), what, memoryview(bytearray(what.payload_bytes)))


def test_every_bfloat16_is_a_number_and_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = to_float32(bits, "bfloat16")
    assert numbers[0x3F80] == 1.0
    assert numbers[0xC049] == -3.140625
    real = ~np.isnan(numbers)
    assert np.array_equal(from_float32(numbers[real], "bfloat16"), bits[real])
    between = np.array([0x3F807FFF, 0x3F808001, 0xBF817FFF, 0xBF818001], np.uint32).view(np.float32)
    assert from_float32(between, "bfloat16").tolist() == [0x3F80, 0x3F81, 0xBF81, 0xBF82]


@pytest.mark.parametrize("dtype", [*ELEMENTS])
def test_the_largest_number_of_a_type_is_finite_and_the_largest(dtype: str) -> None:
    largest = np.array([MAX_NUMBER[dtype], -MAX_NUMBER[dtype]], np.float32)
    elements = from_float32(largest, dtype)
    assert np.array_equal(to_float32(elements, dtype), largest)
    bits = elements[:1].view(np.uint32 if dtype == "float32" else np.uint16)
    with np.errstate(all="ignore"):
        assert np.isinf(to_float32((bits + 1).view(elements.dtype), dtype))
