"""The store of a remote server against a model of it."""

from __future__ import annotations

import random

import pytest

from kvstrata import plugins
from kvstrata.errors import ConfigError
from kvstrata.policies.lru import LRUPolicy
from kvstrata.remote.envelope import ENVELOPE_BYTES
from kvstrata.remote.store import Entry, Store

PAGE = 4096
VALUE = PAGE - ENVELOPE_BYTES
"""A value that takes one page with its envelope."""


def put(store: Store, key: bytes, size: int = VALUE, fill: int = 0, expires_at: float | None = None) -> bool:
    entry = store.reserve(key, size)
    if entry is None:
        return False
    store.value(entry)[:] = bytes([fill]) * size
    if expires_at is not None:
        entry.expires_at = expires_at
    store.commit(entry)
    store.unpin(entry)
    return True


def get(store: Store, key: bytes, now: float = 0.0) -> bytes | None:
    entry = store.get(key, now)
    if entry is None:
        return None
    value = bytes(store.value(entry))
    store.unpin(entry)
    return value


def test_the_budget_is_kept_and_the_least_recently_used_goes_first() -> None:
    store = Store(4 * PAGE, LRUPolicy())
    for number in range(4):
        assert put(store, b"%d" % number, fill=number)
    assert get(store, b"0") == bytes(VALUE)
    assert put(store, b"4")
    assert [store.contains(b"%d" % number, 0) for number in range(5)] == [True, False, True, True, True]
    assert store.used_bytes == store.capacity_bytes == 4 * PAGE
    assert not put(store, b"large", 4 * PAGE)
    assert store.num_evicted == 1
    store.close()


def test_what_is_pinned_is_neither_evicted_nor_reused() -> None:
    store = Store(2 * PAGE, LRUPolicy())
    put(store, b"a", fill=1)
    put(store, b"b", fill=2)
    reading = store.get(b"a", 0)
    assert reading is not None
    assert put(store, b"c", fill=3)
    assert store.contains(b"a", 0)
    other = store.get(b"c", 0)
    assert other is not None
    assert store.reserve(b"d", VALUE) is None
    store.unpin(other)
    put(store, b"a", fill=4)  # replaced while it is read
    assert set(store.value(reading)) == {1}
    assert get(store, b"a") == b"\4" * VALUE
    assert store.used_bytes == 2 * PAGE
    store.unpin(reading)
    assert store.used_bytes == PAGE
    store.close()


def test_nobody_sees_what_is_being_filled_or_was_given_up() -> None:
    store = Store(2 * PAGE, LRUPolicy())
    put(store, b"a", fill=1)
    entry = store.reserve(b"a", VALUE)
    assert entry is not None
    assert get(store, b"a") == b"\1" * VALUE
    store.abort(entry)
    assert get(store, b"a") == b"\1" * VALUE
    assert store.used_bytes == PAGE
    store.close()


def test_entries_expire() -> None:
    store = Store(1 << 20, LRUPolicy())
    put(store, b"short", expires_at=10.0)
    put(store, b"long", expires_at=20.0)
    put(store, b"ever")
    assert get(store, b"short", now=10.0) is None
    assert not store.contains(b"short", 10.0)
    assert store.keys(10.0) == [b"long", b"ever"]
    assert store.expire(10.0) == [b"short"]
    put(store, b"long", expires_at=100.0)
    assert store.expire(50.0) == []
    assert store.expire(100.0) == [b"long"]
    assert store.keys(1e9) == [b"ever"]
    for _ in range(5000):  # what was replaced is not kept for the sake of its time
        put(store, b"again", 10, expires_at=1e12)
    assert len(store._expiries) < 2000
    store.close()


@pytest.mark.parametrize("capacity", [0, 100, 1 << 60])
def test_a_budget_that_cannot_be(capacity: int) -> None:
    with pytest.raises(ConfigError, match="--max-size-gb"):
        Store(capacity, LRUPolicy())


@pytest.mark.parametrize("policy", plugins.names("policies"))
def test_any_order_of_calls_against_a_model(policy: str) -> None:
    rng = random.Random(7)
    store = Store(64 * PAGE, plugins.load("policies", policy)())
    model: dict[bytes, int] = {}
    reading: list[tuple[Entry, int]] = []
    for step in range(4000):
        key = b"%d" % rng.randrange(40)
        match rng.randrange(6):
            case 0 | 1:
                if put(store, key, rng.randrange(1, 4 * PAGE), fill=step % 251):
                    model[key] = step % 251
                model = {held: fill for held, fill in model.items() if store.contains(held, 0)}
            case 2:
                entry = store.get(key, 0)
                assert (entry is not None) == (key in model)
                if entry is not None:
                    reading.append((entry, model[key]))
            case 3 if reading:
                entry, fill = reading.pop(rng.randrange(len(reading)))
                assert set(store.value(entry)) == {fill}
                store.unpin(entry)
            case 4:
                assert store.delete(key) == (model.pop(key, None) is not None)
            case _:
                value = get(store, key)
                assert (value is None) == (key not in model)
                assert value is None or set(value) == {model[key]}
        assert len(store) == len(model)
        assert store.used_bytes <= store.capacity_bytes
    for entry, _ in reading:
        store.unpin(entry)
    for key in list(model):
        store.delete(key)
    assert store.used_bytes == 0
    store.close()
