from __future__ import annotations

import pytest

from kvstrata.cache.gate import RETRY_SECONDS, Gate

NS = b"namespace"


def measured(*, read_bytes_per_second: float, prefill_tokens_per_second: float) -> Gate:
    gate = Gate(enabled=True)
    gate.read("disk", int(read_bytes_per_second), 1.0, 0.0)
    gate.prefilled(NS, int(prefill_tokens_per_second), 1.0, 0.0)
    return gate


def test_without_measurements_everything_is_loaded() -> None:
    gate = Gate(enabled=True)
    assert gate.worth_loading(NS, "disk", 1, 1 << 40, 0.0)
    gate.read("disk", 1, 1.0, 0.0)
    assert gate.worth_loading(NS, "disk", 1, 1 << 40, 0.0)
    gate.prefilled(b"another", 1 << 30, 1.0, 0.0)
    assert gate.worth_loading(NS, "disk", 1, 1 << 40, 0.0)


@pytest.mark.parametrize(
    ("num_tokens", "num_bytes", "worth"),
    [(1000, 999_000, True), (1000, 1_001_000, False), (1, 500, True), (1, 2000, False)],
)
def test_what_takes_longer_to_read_than_to_compute_is_computed(
    num_tokens: int, num_bytes: int, worth: bool
) -> None:
    gate = measured(read_bytes_per_second=1_000_000, prefill_tokens_per_second=1000)
    assert gate.worth_loading(NS, "disk", num_tokens, num_bytes, 1.0) is worth


def test_each_tier_and_namespace_counts_for_itself() -> None:
    gate = measured(read_bytes_per_second=10, prefill_tokens_per_second=1000)
    assert not gate.worth_loading(NS, "disk", 10, 1000, 1.0)
    assert gate.worth_loading(NS, "redis", 10, 1000, 1.0)
    gate.prefilled(b"slow model", 1, 1000.0, 0.0)
    assert gate.worth_loading(b"slow model", "disk", 10, 1000, 1.0)


def test_a_refusal_is_forgotten_after_a_while() -> None:
    gate = measured(read_bytes_per_second=10, prefill_tokens_per_second=1000)
    assert not gate.worth_loading(NS, "disk", 10, 1000, RETRY_SECONDS - 1)
    assert gate.worth_loading(NS, "disk", 10, 1000, RETRY_SECONDS + 1)
    assert gate.worth_loading(NS, "disk", 10, 1000, RETRY_SECONDS + 2)
    gate.read("disk", 10, 1.0, RETRY_SECONDS + 3)
    assert not gate.worth_loading(NS, "disk", 10, 1000, RETRY_SECONDS + 4)


def test_estimates_follow_what_is_seen() -> None:
    gate = measured(read_bytes_per_second=10, prefill_tokens_per_second=1000)
    for _ in range(30):
        gate.read("disk", 1000, 1.0, 1.0)
    assert gate.estimates()["disk_bytes_per_second"] == pytest.approx(1000, rel=0.05)
    assert gate.worth_loading(NS, "disk", 10, 9, 1.0)


def test_nonsense_is_no_measurement() -> None:
    gate = Gate(enabled=True)
    for units, seconds in ((0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0)):
        gate.read("disk", units, seconds, 0.0)
        gate.prefilled(NS, units, seconds, 0.0)
    assert gate.estimates() == {}


def test_switched_off_it_lets_everything_through() -> None:
    gate = Gate(enabled=False)
    gate.read("disk", 1, 1000.0, 0.0)
    gate.prefilled(NS, 1000, 1.0, 0.0)
    assert gate.worth_loading(NS, "disk", 1, 1 << 40, 0.0)
