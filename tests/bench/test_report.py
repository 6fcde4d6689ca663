"""What every benchmark reports."""

from __future__ import annotations

import msgspec

from kvstrata.bench.report import Report, Target, cell, environment, median, summary


def make_report(**ratios: float) -> Report:
    targets = {"low": Target(at_most=1.5), "high": Target(at_least=0.5)}
    return Report("x", environment(), {}, "", ("a",), (("b",),), ratios, targets)


def test_a_target_is_a_bound_on_one_side() -> None:
    assert Target(at_most=2.0).reached(2.0)
    assert not Target(at_most=2.0).reached(2.01)
    assert Target(at_least=0.5).reached(0.5)
    assert not Target(at_least=0.5).reached(0.49)
    assert (str(Target(at_most=1.15)), str(Target(at_least=0.5))) == ("<= 1.15", ">= 0.5")


def test_a_missed_target_is_shown() -> None:
    report = make_report(low=1.6, high=0.7, free=9.0)
    assert report.missed == {"low": 1.6}
    assert summary(report) == [
        ("low", "1.6", "<= 1.5", "MISSED"),
        ("high", "0.7", ">= 0.5", "reached"),
        ("free", "9", "", ""),
    ]


def test_the_machine_and_the_software_are_named() -> None:
    machine = environment()
    assert machine.cores >= 1
    assert machine.memory_bytes > 2**28
    assert machine.cpu_model
    assert "msgspec" in machine.packages
    assert machine.commit is None or len(machine.commit.removesuffix("-dirty")) == 40


def test_a_report_survives_json() -> None:
    report = make_report(low=1.0)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_cells_show_the_digits_that_matter() -> None:
    assert [cell(value) for value in (None, "text", 1_000_000, 1234.56, 0.12345, 2.0)] == [
        "-",
        "text",
        "1,000,000",
        "1,235",
        "0.123",
        "2",
    ]
    assert median([3.0, 1.0, 2.0]) == 2.0
