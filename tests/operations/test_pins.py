"""Pins, without a server."""

from __future__ import annotations

import time

import pytest

from kvstrata.operations.pins import Pins
from kvstrata.testing.client import CHUNK_SIZE, payload_of, prompt
from kvstrata.testing.core import open_core, store


def test_what_is_pinned_is_looked_at_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's thread asks after every request."""
    stored = prompt(CHUNK_SIZE, seed=1)
    with open_core() as cache:
        store(cache, "o", cache.intern(stored.namespace), 0, stored.pieces, payload_of)
        (entry,) = cache.index.entries.values()
        pins = Pins(cache)
        pins.pin("ann", [entry], 60)
        pins.expire()
        cache.clear()
        for _ in range(100):
            pins.expire()
        assert entry.leases == 1
        later = time.monotonic() + 2
        monkeypatch.setattr("kvstrata.operations.pins.time.monotonic", lambda: later)
        pins.expire()
        assert entry.leases == 0
        assert cache.l1_stats()["used_bytes"] == 0
