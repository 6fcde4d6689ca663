"""``kvstrata bench gate``: what its report says of given measurements, and a small run on a real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.bench.gate import GateConfig, Measured, _report, run
from kvstrata.bench.linked import Sample
from kvstrata.bench.report import environment

CACHE = Path(__file__).parents[2] / ".cache"


def samples(*seconds: float, verdict: str = "load") -> list[Sample]:
    return [Sample(each, 0, verdict) for each in seconds]


def test_the_report_compares_neighbours_and_names_the_worst_speed() -> None:
    fast = Measured(
        10.0,
        80e6,
        Sample(1.0, 0, "load"),
        auto=samples(1.0, 1.0),
        never=samples(10.0, 8.0),
        always=samples(0.8),
        auto_beside_always=samples(1.0),
    )
    slow = Measured(
        0.2,
        2e6,
        Sample(19.0, 0, "load"),
        auto=samples(10.2, 8.4, verdict="recompute"),
        never=samples(10.0, 8.0),
        always=samples(50.0),
        auto_beside_always=samples(10.0, verdict="trial"),
    )
    report = _report(GateConfig(), environment(), [fast, slow])
    assert report.ratios["auto_over_recompute_10"] == pytest.approx((0.1 + 0.125) / 2)
    assert report.ratios["auto_over_recompute"] == pytest.approx((1.02 + 1.05) / 2)
    assert report.ratios["auto_over_always_fast"] == pytest.approx(1.25)
    assert list(report.missed) == ["auto_over_always_fast"]
    assert [row[-1] for row in report.rows] == ["2 load", "2 recompute"]
    assert all(len(row) == len(report.columns) for row in report.rows)
    assert report.samples["first_0.2"] == [19.0]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_a_small_run_measures_every_mode() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    config = GateConfig(
        prompt_tokens=300, prompts=1, pairs=1, speeds=(20.0,), pause_seconds=0, cache_dir=str(CACHE)
    )
    report = run(config)
    (row,) = report.rows
    assert row[0] == "20"
    assert {len(report.samples[f"{kind}_20"]) for kind in ("auto", "recompute", "always")} == {1}
