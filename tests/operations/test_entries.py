"""Deleting entries while the core moves them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from kvstrata.metrics import L1
from kvstrata.operations.entries import Entries
from kvstrata.testing.client import CHUNK_SIZE, payload_of, prompt
from kvstrata.testing.core import open_core, settle, store
from kvstrata.tiers.dict import DictTier


@pytest.mark.parametrize(("tiers", "is_left_out"), [(None, True), (["tier0"], True), ([L1], False)])
def test_a_deletion_calls_off_the_writes_that_are_planned(tiers: list[str] | None, is_left_out: bool) -> None:
    """They are planned while L1 is locked, and handed to the tier afterwards; the deletion comes in between."""
    stored, tier = prompt(2 * CHUNK_SIZE, seed=1), DictTier()
    with open_core([tier]) as cache:
        namespace = cache.intern(stored.namespace)
        keys = [namespace.key(piece.chunk_hash, 0) for piece in stored.pieces]
        write, late = cache.tiers[0].write, []

        def hold_back(*args: Any) -> bool:
            late.append(partial(write, *args))
            return True

        cache.tiers[0].write = hold_back  # type: ignore[method-assign]
        store(cache, "o", namespace, 0, stored.pieces, payload_of)
        Entries(cache).delete(keys[:1], tiers)
        settle(cache)
        cache.tiers[0].write = write  # type: ignore[method-assign]
        for call in late:
            call()
        settle(cache)
        assert tier.contains(keys) == [not is_left_out, True]
        assert cache.tiers[0].num_dropped == 0, "nothing was lost"
        assert all(entry.leases == 0 for entry in cache.index.entries.values())
        store(cache, "o", namespace, 0, stored.pieces, payload_of)
        settle(cache)
        assert tier.contains(keys) == [True, True], "what is stored again is written again"
