from __future__ import annotations

import pytest

from kvstrata.cache.gate import RETRY_SECONDS, TRIAL_SHARE, Gate, Verdict

NS = b"namespace"


def measured(*, read_bytes_per_second: float, prefill_tokens_per_second: float) -> Gate:
    gate = Gate()
    gate.read("disk", int(read_bytes_per_second), 1.0, 0.0)
    gate.prefilled(NS, int(prefill_tokens_per_second), 1.0)
    return gate


def verdict(gate: Gate, num_tokens: int, num_bytes: int, now: float = 1.0, tier: str = "disk") -> Verdict:
    return gate.decide(NS, tier, num_tokens, num_bytes, now).verdict


def test_without_a_measurement_of_the_engine_everything_is_loaded() -> None:
    gate = Gate()
    assert verdict(gate, 1, 1 << 40) == Verdict.LOAD
    gate.read("disk", 1, 1.0, 0.0)
    assert verdict(gate, 1, 1 << 40) == Verdict.LOAD
    gate.prefilled(b"another", 1 << 30, 1.0)
    decision = gate.decide(NS, "disk", 1, 1 << 40, 1.0)
    assert decision.verdict == Verdict.LOAD
    assert (decision.load_seconds, decision.prefill_seconds, decision.patience_seconds) == (
        1 << 40,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("num_tokens", "num_bytes", "expected"),
    [
        (1000, 799_000, Verdict.LOAD),
        (1000, 801_000, Verdict.RECOMPUTE),
        (1, 500, Verdict.LOAD),
        (1, 2000, Verdict.RECOMPUTE),
    ],
)
def test_what_is_not_clearly_faster_to_read_than_to_compute_is_computed(
    num_tokens: int, num_bytes: int, expected: Verdict
) -> None:
    gate = measured(read_bytes_per_second=1_000_000, prefill_tokens_per_second=1000)
    decision = gate.decide(NS, "disk", num_tokens, num_bytes, 1.0)
    assert decision.verdict == expected
    assert decision.load_seconds == pytest.approx(num_bytes / 1e6)
    assert decision.prefill_seconds == decision.patience_seconds == pytest.approx(num_tokens / 1e3)


@pytest.mark.parametrize(("estimated", "patience"), [(0.001, 0.25), (0.125, 0.25), (0.2, 0.4), (0.7, 1.0)])
def test_a_load_is_given_up_after_twice_its_estimate_or_a_quarter_of_computing(
    estimated: float, patience: float
) -> None:
    gate = measured(read_bytes_per_second=1_000_000, prefill_tokens_per_second=1000)
    num_bytes = int(estimated * 1e6)
    assert gate.decide(NS, "disk", 1000, num_bytes, 1.0).patience_seconds == pytest.approx(patience)
    assert gate.patience_seconds(NS, 1000) == 1.0


def test_an_estimate_of_when_a_load_ends_includes_those_before_it() -> None:
    gate = measured(read_bytes_per_second=1_000_000, prefill_tokens_per_second=1000)
    for number in range(1, 4):
        decision = gate.decide(NS, "disk", 1000, 150_000, 1.0)
        assert decision.load_seconds == pytest.approx(0.15)
        assert decision.patience_seconds == pytest.approx(2 * 0.15 * number)
        gate.begun(decision, 1.0)
    assert gate.decide(NS, "disk", 1000, 150_000, 1.5).patience_seconds == pytest.approx(0.3)


def burst(gate: Gate, ends: list[float], num_bytes: int = 100_000) -> None:
    """Loads that begin at once, and end after so many seconds."""
    decision = gate.decide(NS, "disk", 1000, num_bytes, 100.0)
    for _ in ends:
        gate.begun(decision, 100.0)
    for seconds in ends:
        gate.read("disk", num_bytes, seconds, 100.0 + seconds)


@pytest.mark.parametrize(
    ("ends", "alone"),
    [
        ([0.1 * number for number in range(1, 26)], 0.1),  # one after the other
        ([2.5] * 25, 0.1),  # all share the link
        ([0.1] * 25, 0.1),  # each has a link of its own
        ([0.5 * number for number in range(1, 26)], 0.5),  # slower than before
        ([0.05] * 25, 0.05),  # faster
    ],
)
def test_what_loads_wait_for_each_other_is_forgotten_when_they_have_ended(
    ends: list[float], alone: float
) -> None:
    gate = measured(read_bytes_per_second=1_000_000, prefill_tokens_per_second=1000)
    burst(gate, ends)
    decision = gate.decide(NS, "disk", 1000, 100_000, 103.0)
    assert decision.load_seconds == pytest.approx(alone, rel=0.01)


def test_while_loads_queue_their_waiting_counts() -> None:
    gate = measured(read_bytes_per_second=1_000_000, prefill_tokens_per_second=1000)
    decision = gate.decide(NS, "disk", 1000, 100_000, 100.0)
    gate.begun(decision, 100.0)  # and does not end
    burst(gate, [0.1 * number for number in range(1, 26)])
    assert verdict(gate, 1000, 100_000, 103.0) == Verdict.RECOMPUTE
    gate.read("disk", 100_000, 3.0, 103.0)
    assert verdict(gate, 1000, 100_000, 103.0) == Verdict.LOAD


def test_several_loads_that_bring_nothing_measure_nothing() -> None:
    gate = Gate()
    gate.prefilled(NS, 1000, 1.0)
    decision = gate.decide(NS, "disk", 1000, 1000, 1.0)
    gate.begun(decision, 1.0)
    gate.begun(decision, 1.0)
    for _ in range(2):
        gate.read("disk", 0, 1.0, 2.0)
    assert gate.decide(NS, "disk", 1000, 1000, 2.0).load_seconds is None


def test_each_tier_and_namespace_counts_for_itself() -> None:
    gate = measured(read_bytes_per_second=10, prefill_tokens_per_second=1000)
    gate.read("redis", 10_000, 1.0, 0.0)
    assert verdict(gate, 10, 1000) == Verdict.RECOMPUTE
    assert verdict(gate, 1000, 1000, tier="redis") == Verdict.LOAD
    gate.prefilled(b"slow model", 1, 1000.0)
    assert gate.decide(b"slow model", "disk", 10, 1000, 1.0).verdict == Verdict.LOAD


def test_a_tier_that_was_not_measured_is_tried_by_one_load_at_a_time() -> None:
    gate = Gate()
    gate.prefilled(NS, 1000, 1.0)
    decision = gate.decide(NS, "disk", 1000, 1 << 40, 1.0)
    assert decision.verdict == Verdict.TRIAL
    assert decision.patience_seconds == TRIAL_SHARE * 1.0
    gate.begun(decision, 1.0)
    assert verdict(gate, 1000, 1 << 40) == Verdict.RECOMPUTE
    gate.read("disk", 0, 1.0, 2.0)  # it brought nothing: the next one may try
    assert verdict(gate, 1000, 1 << 40) == Verdict.TRIAL
    gate.begun(decision, 3.0)
    gate.read("disk", 1 << 40, 0.5, 4.0)
    assert verdict(gate, 1000, 1 << 40, 4.0) == Verdict.LOAD


def test_what_was_written_says_how_fast_a_tier_is_until_it_was_read_from() -> None:
    gate = Gate()
    gate.prefilled(NS, 1000, 1.0)
    gate.wrote("disk", 0, 0.0, 0.0)  # it had it already
    assert verdict(gate, 1000, 2000) == Verdict.TRIAL
    gate.wrote("disk", 1000, 1.0, 0.0)
    assert verdict(gate, 1000, 2000) == Verdict.RECOMPUTE
    assert verdict(gate, 1000, 500) == Verdict.LOAD
    gate.read("disk", 100_000, 1.0, 0.0)
    gate.wrote("disk", 1000, 1.0, 0.0)
    assert verdict(gate, 1000, 2000) == Verdict.LOAD
    gate.wrote("other", 1_000_000, 1.0, 0.0)
    assert gate.order(["disk", "other"], 1000) == [0, 1], "only reads say which is the fastest to read from"


def test_a_refusal_is_tried_again_after_a_while() -> None:
    gate = measured(read_bytes_per_second=10, prefill_tokens_per_second=1000)
    assert verdict(gate, 10, 1000, RETRY_SECONDS - 1) == Verdict.RECOMPUTE
    decision = gate.decide(NS, "disk", 10, 1000, RETRY_SECONDS + 1)
    assert decision.verdict == Verdict.TRIAL
    gate.begun(decision, RETRY_SECONDS + 1)
    assert verdict(gate, 10, 1000, RETRY_SECONDS + 2) == Verdict.RECOMPUTE
    gate.read("disk", 10, 1.0, RETRY_SECONDS + 3)
    assert verdict(gate, 10, 1000, RETRY_SECONDS + 4) == Verdict.RECOMPUTE
    assert verdict(gate, 10, 1000, 2 * RETRY_SECONDS + 4) == Verdict.TRIAL


def test_estimates_follow_what_is_seen() -> None:
    gate = measured(read_bytes_per_second=10, prefill_tokens_per_second=1000)
    for _ in range(30):
        gate.read("disk", 1000, 1.0, 1.0)
    assert gate.estimates()["disk_bytes_per_second"] == pytest.approx(1000, rel=0.05)
    assert verdict(gate, 10, 7) == Verdict.LOAD


def test_latency_is_no_bandwidth() -> None:
    """A small read from a tier that is far away does not make large ones look slow."""
    gate = Gate()
    gate.prefilled(NS, 1000, 1.0)
    gate.answered("far", 0.1)
    gate.read("far", 10_000, 0.101, 0.0)
    assert gate.decide(NS, "far", 10_000, 1_000_000, 1.0).load_seconds == pytest.approx(0.1 + 1.01, rel=0.02)
    assert verdict(gate, 10_000, 1_000_000, tier="far") == Verdict.LOAD
    assert verdict(gate, 50, 1_000, tier="far") == Verdict.RECOMPUTE
    assert gate.estimates()["far_latency_seconds"] == pytest.approx(0.1)


def test_the_order_is_by_speed_where_speeds_are_known() -> None:
    gate = Gate()
    names = ["a", "b", "c"]
    assert gate.order(names, 1000) == [0, 1, 2]
    gate.read("b", 1000, 1.0, 0.0)
    assert gate.order(names, 1000) == [0, 1, 2]
    gate.read("c", 1000, 0.5, 0.0)
    assert gate.order(names, 1000) == [0, 2, 1]
    gate.read("a", 1000, 0.7, 0.0)
    assert gate.order(names, 1000) == [2, 0, 1]
    even = Gate()
    for name in names:
        even.read(name, 1000, 1.0, 0.0)
    assert even.order(names, 1000) == [0, 1, 2]
    gate.answered("c", 10.0)
    assert gate.order(names, 1000) == [0, 1, 2]
    assert gate.order(names, 100_000) == [2, 0, 1], "latency matters less for more bytes"


def test_nonsense_is_no_measurement() -> None:
    gate = Gate()
    for units, seconds in ((0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0)):
        gate.read("disk", units, seconds, 0.0)
        gate.prefilled(NS, units, seconds)
    assert gate.estimates() == {}


def test_modes() -> None:
    for mode, expected in (("always", Verdict.LOAD), (False, Verdict.LOAD), ("never", Verdict.RECOMPUTE)):
        gate = Gate(mode)
        gate.read("disk", 1, 1000.0, 0.0)
        gate.prefilled(NS, 1000, 1.0)
        decision = gate.decide(NS, "disk", 1, 1 << 40, 1.0)
        assert decision.verdict == expected
        assert decision.patience_seconds is None
    assert Gate(True).mode == "auto"
    with pytest.raises(ValueError, match="auto, always, never"):
        Gate("sometimes")
