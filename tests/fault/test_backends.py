"""Every backend with every fault that applies to it, under load from a real client of the core.

``make test-faults`` runs all of them, prints the table and writes ``fault-report.json``. Time decides there
whether a case has passed; as a test, a case fails when something is wrong, left behind, or hangs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_base import Backend
from backends import BACKENDS
from faults import OPERATION_SECONDS, Fault
from load import Load, prompts
from matrix import CANNOT, COLUMNS, has_case, matrix
from report import ROWS, Row

from kvstrata.cache.io import TierIO
from kvstrata.client import LocalClient
from kvstrata.testing.client import small_settings
from kvstrata.testing.leaks import leaked_since, snapshot
from kvstrata.testing.waiting import wait_until

LOOKUP_SECONDS = 0.5
SLACK_SECONDS = 0.25
HUNG_SECONDS = 15.0
"""What waits longer hangs, on however busy a machine."""
FAULT_SECONDS = 0.8
NEVER_SECONDS = 40.0
TIER = "l2"
DOCS = Path(__file__).parents[2] / "docs" / "faults.md"

pytestmark = pytest.mark.fault_suite


def parameters() -> list[object]:
    return [
        pytest.param(name, fault, id=f"{name}: {fault.name}", marks=list(marks(made, fault)))
        for name, made in BACKENDS.items()
        for fault in made.faults
    ]


def marks(made: type[Backend], fault: Fault) -> Iterator[pytest.MarkDecorator]:
    if fault.name not in made.in_ci:
        yield pytest.mark.slow
    if made.extra:
        yield pytest.mark.extra(made.extra)
    if made.keeps:
        yield pytest.mark.leaks_allowed(made.keeps)


@pytest.fixture(scope="session", autouse=True)
def prepared(request: pytest.FixtureRequest) -> None:
    chosen = {
        item.callspec.params["name"] for item in request.session.items if item.originalname == "test_fault"
    }
    for name in chosen:
        if BACKENDS[name].missing() is None:
            BACKENDS[name].prepare()


def test_names() -> None:
    for name, made in BACKENDS.items():
        assert made.in_ci <= {fault.name for fault in made.faults}, name


def test_the_docs_have_every_case() -> None:
    text = DOCS.read_text()
    cases = {(name, fault.name) for name, made in BACKENDS.items() for fault in made.faults}
    assert cases == {
        (row[1].strip(), row[2].strip()) for row in map(_cells, text.splitlines()) if len(row) == 10
    }


def test_every_backend_meets_every_kind_of_fault_or_the_docs_say_why_not() -> None:
    assert CANNOT.keys() <= BACKENDS.keys()
    for name in BACKENDS:
        for column in COLUMNS:
            assert has_case(name, column) != (column in CANNOT.get(name, {})), (name, column)
    assert "\n".join(["", *matrix(), ""]) in DOCS.read_text(), (
        "python tests/fault/matrix.py prints what it must be"
    )


def _cells(line: str) -> list[str]:
    return line.split("|") if line.endswith(" ok |") else []


@pytest.mark.parametrize(("name", "fault"), parameters())
def test_fault(name: str, fault: Fault, tmp_path: Path) -> None:
    reason = BACKENDS[name].missing()
    if reason:
        pytest.skip(reason)
    row = Row(backend=name, fault=fault.name, deadline_seconds=LOOKUP_SECONDS + SLACK_SECONDS)
    ROWS.append(row)
    before = snapshot()
    with BACKENDS[name](tmp_path) as backend:
        left = run_case(backend, fault, row)
    if not backend.keeps:
        left += sorted(leaked_since(before))
    row.leaks = len(left)
    row.judge()
    assert row.wrong_bytes == 0
    assert left == []
    assert row.recovered_seconds is not None, "the tier is not used again"
    assert row.longest_wait_seconds < HUNG_SECONDS


def run_case(backend: Backend, fault: Fault, row: Row) -> list[str]:
    """Fill in ``row``; what the core still holds in the end."""
    settings = small_settings(
        tiers=({"name": TIER, "timeout_seconds": OPERATION_SECONDS, **backend.tier},),
        local_cpu=False,  # so that every look-up needs the tier
        lookup_timeout_ms=int(LOOKUP_SECONDS * 1000),
        breaker_reset_seconds=0.2,
        gate="always",
    )
    with LocalClient(settings) as client:
        load = Load(client)
        (tier,) = client.cache.tiers
        assert load.seconds_until_used(TIER, seed=1000, bound_seconds=NEVER_SECONDS) is not None
        for asked in prompts():
            load.step("warm", asked)
        load.longest_wait_seconds = 0.0
        with load.running():
            load.goes_on()
            with fault.inject(backend):
                during(load, tier, fault)
            row.recovered_seconds = load.seconds_until_used(TIER, seed=2000, bound_seconds=NEVER_SECONDS)
            wait_until(lambda: not tier.breaker.is_open, "the breaker closes")
            load.goes_on()
        left = held(client)
        row.wrong_bytes, row.longest_wait_seconds = load.wrong_bytes, load.longest_wait_seconds
    return left


def during(load: Load, tier: TierIO, fault: Fault) -> None:
    """Requests go on while the fault lasts, and the breaker opens if it must."""
    until = time.monotonic() + FAULT_SECONDS
    if fault.opens:
        wait_until(lambda: tier.breaker.is_open, "the breaker opens")
    load.goes_on()
    if fault.serves:
        before = load.num_tier_hits
        wait_until(lambda: load.num_tier_hits > before + 10, "a part of what is stored is found")
    time.sleep(max(0.0, until - time.monotonic()))


def held(client: LocalClient) -> list[str]:
    """What the core still holds once all is done; with ``local_cpu`` false that must be nothing."""
    deadline = time.monotonic() + HUNG_SECONDS
    while (left := _held(client)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _held(client: LocalClient) -> list[str]:
    counts = client.cache.l1_stats()
    queued = sum(tier.queued_bytes for tier in client.cache.tiers)
    held = {name: counts[name] for name in ("entries", "used_bytes", "lookups", "reservations")}
    return [f"{count} {name}" for name, count in {**held, "queued_bytes": queued}.items() if count]
