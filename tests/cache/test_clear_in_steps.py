"""A clear lets others have their turn, and means what it meant when nobody could come in between."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvstrata.cache.cache import Cache
from kvstrata.testing.client import CHUNK_SIZE, Prompt, make_namespace, payload_of, prompt
from kvstrata.testing.core import open_core, settle, store, wait_lookup
from kvstrata.testing.faults import Faults, FaultyTier
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.dict import DictTier

OLD = prompt(6 * CHUNK_SIZE, seed=1)
NEW = prompt(2 * CHUNK_SIZE, seed=2)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.cache.clearing._ENTRIES_AT_ONCE", 2)


@pytest.fixture
def tier() -> DictTier:
    return DictTier()


@pytest.fixture
def cache(tier: DictTier) -> Iterator[Cache]:
    with open_core([tier], pool_bytes=4 << 20, probe_seconds=0.02) as cache:
        yield cache


def put(cache: Cache, *stored: Prompt) -> None:
    for each in stored:
        store(cache, "o", cache.intern(each.namespace), 0, each.pieces, payload_of)
    settle(cache)


def found(cache: Cache, asked: Prompt) -> int:
    hit = wait_lookup(cache, "o", "r", cache.intern(asked.namespace), asked.prefix)
    cache.release("o", "r")
    return hit.num_tokens


def test_whoever_comes_in_between_is_served_and_what_it_stores_stays(cache: Cache, tier: DictTier) -> None:
    put(cache, OLD)
    steps = cache.clearing()
    assert next(steps) == 2
    assert found(cache, OLD) == 0, "its beginning is gone, and the tier is not asked"
    put(cache, NEW)
    assert found(cache, NEW) == 2 * CHUNK_SIZE
    assert sum(steps) == 4
    wait_until(lambda: not tier.frames, "the tier is cleared")
    assert (found(cache, OLD), found(cache, NEW)) == (0, 2 * CHUNK_SIZE)


def test_what_is_used_before_its_turn_reaches_no_tier() -> None:
    """Not even one that was away, and comes back in between for an earlier clear."""
    held = DictTier()
    tier = FaultyTier(held, Faults(error_rate=1.0))
    with open_core([tier], pool_bytes=4 << 20, probe_seconds=0.02) as cache:
        namespace = cache.intern(OLD.namespace)
        cache.tiers[0].stalled()
        cache.clear()
        put(cache, OLD)
        steps = cache.clearing()
        next(steps)
        tier.faults = Faults()
        wait_until(lambda: len(cache._clears._running[0]) == 1, "the first clear has ended")
        assert cache.reserve("o", namespace, 0, OLD.pieces[2:]) == [None] * 4, "they are held still"
        assert sum(steps) == 4
        settle(cache)
        wait_until(lambda: not cache._clears.is_running(0, namespace), "it is cleared")
        assert held.frames == {}


def test_a_clear_that_is_broken_off_clears_the_tiers_all_the_same(cache: Cache, tier: DictTier) -> None:
    put(cache, OLD)
    steps = cache.clearing()
    next(steps)
    del steps
    wait_until(lambda: not tier.frames, "the tier is cleared")
    put(cache, NEW)
    assert len(tier.frames) == len(NEW.pieces), "and is in use again"


def test_one_clear_waits_for_a_tier_that_is_away_however_often_it_is_asked_for() -> None:
    tier = FaultyTier(DictTier(), Faults(error_rate=1.0))
    with open_core([tier], probe_seconds=0.02) as cache:
        namespace = cache.intern(OLD.namespace)
        cache.tiers[0].stalled()
        wait_until(lambda: cache.tiers[0].breaker.is_open, "it is given up")
        for _ in range(20):
            cache.clear(namespace)
        assert sum(thread.name == "kvstrata-tier0-clear" for thread in threading.enumerate()) <= 1
        cache.clear()
        tier.faults = Faults()
        wait_until(lambda: not cache._clears.is_running(0, namespace), "both have ended")


def test_a_clear_of_a_namespace_leaves_others(cache: Cache, tier: DictTier) -> None:
    other = prompt(2 * CHUNK_SIZE, seed=1, namespace=make_namespace("org/other"))
    put(cache, OLD, other)
    assert cache.clear(cache.intern(OLD.namespace)) == 6
    assert (found(cache, OLD), found(cache, other)) == (0, 2 * CHUNK_SIZE)
    wait_until(lambda: len(tier.frames) == 2, "the tier keeps the others")
