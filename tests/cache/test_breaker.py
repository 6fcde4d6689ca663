from __future__ import annotations

from kvstrata.cache.breaker import Breaker


def test_it_opens_after_faults_in_a_row() -> None:
    breaker = Breaker(3)
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.succeeded()
    assert [breaker.failed(), breaker.failed(), breaker.is_open] == [False, False, False]
    assert breaker.failed()
    assert breaker.is_open


def test_opening_is_told_once() -> None:
    breaker = Breaker(1)
    assert breaker.failed()
    assert not breaker.failed()
    assert not breaker.stalled()
    assert breaker.is_open


def test_a_stall_opens_at_once() -> None:
    breaker = Breaker(5)
    assert breaker.stalled()
    assert breaker.is_open
    assert not breaker.stalled()


def test_success_closes_and_forgets() -> None:
    breaker = Breaker(2)
    breaker.failed()
    breaker.failed()
    breaker.succeeded()
    assert not breaker.is_open
    assert not breaker.failed()
    assert breaker.failed()
