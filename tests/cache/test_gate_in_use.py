"""The gate in a core: what a request waits for with a slow tier, a fast one, and one that changes."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest

from kvstrata.cache.cache import Cache
from kvstrata.cache.gate import HICCUP_SHARE, RETRY_SECONDS, TRIAL_SHARE
from kvstrata.cache.index import State
from kvstrata.testing.client import CHUNK_SIZE, Prompt, make_tokens, payload_of, prompt
from kvstrata.testing.core import open_core, settle, store
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.dict import DictTier
from kvstrata.types import Hit, Miss, MissReason

POOL_BYTES = 4 << 20


class Clock:
    """A clock that the tier moves: time passes only where somebody would wait."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TimedTier(DictTier):
    """Reads take as long as it says, on the test's clock; ``TierIO`` measures on the real one, so it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        self.num_reads += 1
        return super().read(keys, buffers)


class Measured:
    """A core whose measurements are what the test says."""

    def __init__(self, cache: Cache, tier: TimedTier, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        self.tier = tier
        self.clock = clock
        self.read_seconds = 0.0
        self.prefill_seconds = 1.0
        gate_read = cache.gate.read
        monkeypatch.setattr(
            cache.gate,
            "read",
            lambda name, size, _, now: gate_read(name, size, self.read_seconds, now),
        )
        monkeypatch.setattr(cache.gate, "wrote", lambda *_: None)
        monkeypatch.setattr(cache.gate, "answered", lambda *_: None)

    def prepare(self, stored: Prompt) -> None:
        namespace = self.cache.intern(stored.namespace)
        store(self.cache, "o", namespace, 0, stored.pieces, payload_of)
        settle(self.cache)
        self.cache.report_prefill(namespace, len(stored), self.prefill_seconds)
        self.cache.clear(tiers=False)

    def know(self, read_seconds: float) -> None:
        """Store, and let one request measure the tier."""
        self.read_seconds = read_seconds
        self.prepare(ASKED)
        self.ttft(ASKED, "measures")

    def look_up(self, asked: Prompt, request_id: str) -> Hit:
        return self.cache.lookup("o", request_id, self.cache.intern(asked.namespace), asked.prefix)

    def ttft(self, asked: Prompt, request_id: str) -> tuple[Hit, float]:
        """The hit, and the time to the first token: what was waited, then computing what was not hit.

        A load ends when the clock says so: until then the look-up is asked again as an engine would.
        """
        started = self.clock.now
        loads_until: float | None = None
        with held_back(self.cache, "read") as reads:
            while (hit := self.look_up(asked, request_id)).pending:
                if reads and loads_until is None:
                    loads_until = self.clock.now + self.read_seconds
                if loads_until is not None:
                    self.clock.now += self.prefill_seconds / 1000
                    if self.clock.now >= loads_until and reads:
                        reads.pop()()
                        settle(self.cache)
        self.cache.release("o", request_id)
        waited = self.clock.now - started
        self.cache.clear(tiers=False)
        computed = len(asked) - hit.num_tokens
        return hit, waited + self.prefill_seconds * computed / len(asked)


@contextmanager
def held_back(cache: Cache, operation: str) -> Iterator[list[partial[None]]]:
    """What the core asks of its tier is put into a list; what is left there at the end is done then."""
    tier, calls = cache.tiers[0], []
    original = getattr(tier, operation)
    setattr(tier, operation, lambda *args: calls.append(partial(original, *args)))
    try:
        yield calls
    finally:
        setattr(tier, operation, original)
        for call in calls:
            call()
        settle(cache)


@contextmanager
def measured(
    monkeypatch: pytest.MonkeyPatch, gate: str = "auto", lookup_timeout_seconds: float = 3600.0
) -> Iterator[Measured]:
    clock, tier = Clock(), TimedTier()
    with open_core(
        [tier],
        pool_bytes=POOL_BYTES,
        gate=gate,
        clock=clock,
        lookup_timeout_seconds=lookup_timeout_seconds,
    ) as cache:
        yield Measured(cache, tier, clock, monkeypatch)


ASKED = prompt(16 * CHUNK_SIZE, seed=1)


def test_a_slow_tier_never_costs_more_than_five_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch) as core:
        core.read_seconds = 10.0
        core.prepare(ASKED)
        for number in range(20):
            hit, ttft = core.ttft(ASKED, f"r{number}")
            assert hit.miss_reason == MissReason.GATED
            assert ttft <= core.prefill_seconds * (1 + TRIAL_SHARE) + 0.002
        assert core.cache.metrics.totals()["gate_decisions"]["tier0"] == {
            "load": 0,
            "trial": 1,
            "recompute": 19,
        }
        core.clock.now += RETRY_SECONDS + 1
        assert core.ttft(ASKED, "later")[1] <= core.prefill_seconds * (1 + TRIAL_SHARE) + 0.002


def test_a_fast_tier_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch) as core:
        core.read_seconds = 0.04
        core.prepare(ASKED)
        for number in range(5):
            hit, ttft = core.ttft(ASKED, f"r{number}")
            assert hit.num_tokens == len(ASKED)
            assert ttft < 0.05
        totals = core.cache.metrics.totals()
        assert totals["gate_decisions"]["tier0"] == {"load": 4, "trial": 1, "recompute": 0}
        assert totals["saved_prefill_seconds"] == pytest.approx(5.0)
        assert totals["gate_estimated_load_seconds"]["tier0"] == pytest.approx(4 * 0.04)
        assert totals["gate_load_seconds"]["tier0"] > 0


def test_a_tier_that_becomes_slow_costs_one_request_a_quarter_of_its_prefill_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with measured(monkeypatch) as core:
        core.read_seconds = 0.04
        core.prepare(ASKED)
        for number in range(3):
            core.ttft(ASKED, f"fast{number}")
        core.read_seconds = 100.0
        ttfts = [core.ttft(ASKED, f"slow{number}")[1] for number in range(4)]
        assert ttfts[0] == pytest.approx(1 + HICCUP_SHARE, abs=0.01)
        assert ttfts[1:] == [1.0, 1.0, 1.0]
        core.clock.now += RETRY_SECONDS + 1
        core.read_seconds = 0.04
        hit, _ = core.ttft(ASKED, "tried")
        assert hit.num_tokens == len(ASKED), "it is fast again, and was tried"


@pytest.mark.parametrize("speed", [10.0, 2.0, 1.25, 1.1, 1.0, 0.9, 0.8, 0.5, 0.2])
def test_near_break_even_hardly_a_request_pays_twice(speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads vary by 15%. Beyond the one that notices the speed, requests cost what computing does, and a trial."""
    noise = random.Random(7)
    with measured(monkeypatch) as core:
        core.read_seconds = 0.05
        core.prepare(ASKED)
        for number in range(4):
            core.ttft(ASKED, f"fast{number}")
        ttfts = []
        for number in range(40):
            core.read_seconds = noise.uniform(0.85, 1.15) / speed
            core.clock.now += 10
            ttfts.append(core.ttft(ASKED, f"r{number}")[1])
        assert ttfts[0] <= 1 + HICCUP_SHARE + 0.002, "the one that notices"
        # One load that is estimated to be worthwhile, and takes 1% longer than computing.
        assert sum(ttft > 1 + TRIAL_SHARE + 0.002 for ttft in ttfts[1:]) <= (speed == 1.1)
        if speed >= 2:
            assert statistics.median(ttfts) < 1.15 / speed


def test_a_tier_that_is_fast_again_is_known_after_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch) as core:
        core.read_seconds = 10.0
        core.prepare(ASKED)
        for number in range(5):
            core.ttft(ASKED, f"slow{number}")
            core.clock.now += RETRY_SECONDS + 1
        core.read_seconds = 0.2
        assert core.ttft(ASKED, "tried")[1] <= 1 + TRIAL_SHARE + 0.002
        assert core.ttft(ASKED, "known")[1] == pytest.approx(0.2, abs=0.01)


def test_always_waits_and_never_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch, gate="always") as core:
        core.read_seconds = 10.0
        core.prepare(ASKED)
        assert core.ttft(ASKED, "r")[0].num_tokens == len(ASKED)
        assert core.ttft(ASKED, "s")[0].num_tokens == len(ASKED)
    with measured(monkeypatch, gate="never") as core:
        core.prepare(ASKED)
        hit, ttft = core.ttft(ASKED, "r")
        assert (hit.num_tokens, ttft, core.tier.num_reads) == (0, 1.0, 0)


def test_a_request_does_not_wait_for_what_another_one_tries() -> None:
    """Both want the same prefix; the tier is slow, and one load is under way to measure it."""
    clock, tier = Clock(), TimedTier()
    with open_core(
        [tier], pool_bytes=POOL_BYTES, gate="auto", clock=clock, lookup_timeout_seconds=3600
    ) as cache:
        namespace = cache.intern(ASKED.namespace)
        store(cache, "o", namespace, 0, ASKED.pieces, payload_of)
        settle(cache)
        cache.clear(tiers=False)
        cache.gate._tiers.clear()  # as after a restart
        cache.report_prefill(namespace, len(ASKED), 1.0)
        with held_back(cache, "read") as reads:
            assert cache.lookup("o", "first", namespace, ASKED.prefix).pending
            wait_until(lambda: bool(reads), "its load has begun")
            assert cache.lookup("o", "second", namespace, ASKED.prefix).pending
            clock.now += TRIAL_SHARE + 0.001
            for request_id in ("first", "second"):
                hit = cache.lookup("o", request_id, namespace, ASKED.prefix)
                assert (hit.pending, hit.num_tokens, hit.miss_reason) == (False, 0, MissReason.GATED)
            assert not cache.tiers[0].breaker.is_open, "it did nothing wrong"
        assert cache.lookup("o", "third", namespace, ASKED.prefix).num_tokens == len(ASKED)
        cache.release("o", "third")


@pytest.mark.parametrize(
    ("estimated", "waited"), [(0.04, 0.25), (0.1, 0.25), (0.2, 0.4), (0.3, 0.6), (0.45, 0.9), (0.6, 1.0)]
)
def test_a_load_is_given_up_that_takes_much_longer_than_estimated(
    estimated: float, waited: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with measured(monkeypatch) as core:
        core.know(estimated)
        core.read_seconds = 100.0
        hit, ttft = core.ttft(ASKED, "r")
        assert (hit.num_tokens, hit.miss_reason) == (0, MissReason.GATED)
        assert ttft == pytest.approx(1 + waited, abs=0.01)
        explanation = core.cache.explain("r")
        assert explanation is not None
        assert "given up" in explanation.detail
        assert not core.cache.tiers[0].breaker.is_open
        assert core.ttft(ASKED, "next")[1] == 1.0, "the load went on, and was measured"


def test_a_hiccup_shorter_than_a_quarter_of_computing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch) as core:
        core.know(0.01)
        for number in range(10):
            core.read_seconds = 0.01 if number % 2 else HICCUP_SHARE - 0.002
            assert core.ttft(ASKED, f"r{number}")[0].num_tokens == len(ASKED)


def test_a_shorter_deadline_of_look_ups_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch, lookup_timeout_seconds=0.1) as core:
        core.know(0.01)
        core.read_seconds = 100.0
        hit, ttft = core.ttft(ASKED, "r")
        assert hit.miss_reason == MissReason.DEADLINE
        assert ttft == pytest.approx(1.1, abs=0.01)


def test_what_had_arrived_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch) as core:
        core.know(0.04)
        with held_back(core.cache, "read") as reads:
            assert core.look_up(ASKED, "r").pending
            wait_until(lambda: bool(reads), "its load has begun")
            call = reads.pop()
            transfers, done, measure, span = call.args
            call.func(transfers[:6], done, lambda *_: None, span)
            reads.append(partial(call.func, transfers[6:], done, measure, span))
            entries = core.cache.index.entries
            wait_until(lambda: sum(e.state is State.READY for e in entries.values()) == 6, "some arrived")
            assert core.look_up(ASKED, "r").pending
            core.clock.now += HICCUP_SHARE + 0.001
            hit = core.look_up(ASKED, "r")
            assert (hit.num_tokens, hit.miss_reason) == (6 * CHUNK_SIZE, MissReason.GATED)
        core.cache.release("o", "r")
        assert core.look_up(ASKED, "s").num_tokens == len(ASKED)


def test_nobody_waits_for_a_load_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with measured(monkeypatch) as core:
        core.know(0.04)
        with held_back(core.cache, "read") as reads:
            assert core.look_up(ASKED, "first").pending
            wait_until(lambda: bool(reads), "its load has begun")
            core.clock.now += 0.1
            assert core.look_up(ASKED, "second").pending
            core.clock.now += HICCUP_SHARE - 0.1
            for request_id in ("first", "second", "a new one"):
                hit = core.look_up(ASKED, request_id)
                assert (hit.pending, hit.num_tokens, hit.miss_reason) == (False, 0, MissReason.GATED)
            core.cache.gate.mode = "always"
            assert core.look_up(ASKED, "told to wait").pending
        assert core.look_up(ASKED, "told to wait").num_tokens == len(ASKED)


def test_loads_that_queue_behind_others_are_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests at once; the tier loads one after the other, each as fast as estimated."""
    prompts = [prompt(len(ASKED), seed) for seed in range(2, 10)]
    with measured(monkeypatch) as core:
        core.know(0.1)
        for each in prompts:
            core.prepare(each)
        with held_back(core.cache, "read") as reads:
            for number, each in enumerate(prompts):
                assert core.look_up(each, f"r{number}").pending
                wait_until(lambda: len(reads) == number + 1, "its load has begun")  # noqa: B023  called at once
            for number, each in enumerate(prompts):
                core.clock.now += 0.1
                for waiting in range(number, len(prompts)):
                    assert core.look_up(prompts[waiting], f"r{waiting}").pending
                core.read_seconds = 0.1 * (number + 1)
                reads.pop(0)()
                wait_until(lambda: not core.look_up(each, f"r{number}").pending, "it is loaded")  # noqa: B023
                assert core.look_up(each, f"r{number}").num_tokens == len(each)
                core.cache.release("o", f"r{number}")
        core.cache.clear(tiers=False)
        core.read_seconds = 0.1
        assert core.ttft(ASKED, "alone")[1] == pytest.approx(0.1, abs=0.01), "it queues behind nobody"


def test_a_load_for_a_few_tokens_does_not_shorten_the_wait_for_what_is_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two requests that share most of a prompt ask the tier at once; the second loads only what it has more."""
    longer = Prompt(ASKED.tokens + make_tokens(CHUNK_SIZE, seed=2), ASKED.namespace)
    with measured(monkeypatch) as core:
        core.prepare(longer)
        core.know(0.4)
        with held_back(core.cache, "read") as reads:
            with held_back(core.cache, "contains"):
                assert core.look_up(ASKED, "first").pending
                assert core.look_up(longer, "second").pending
            wait_until(lambda: len(reads) == 2, "both loads have begun")
            core.clock.now += 0.39
            assert core.look_up(longer, "second").pending
        assert core.look_up(longer, "second").num_tokens == len(longer)
