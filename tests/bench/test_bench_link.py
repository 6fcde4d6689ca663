"""``kvstrata bench link``: what its report says of given measurements, and a small run on a real vLLM."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kvstrata.bench.link import LinkConfig, Measured, break_even, drawing, report, run, tier_name
from kvstrata.bench.linked import Sample
from kvstrata.bench.report import environment

CACHE = Path(__file__).parents[2] / ".cache"


def samples(*seconds: float, hit_tokens: int = 1999) -> list[Sample]:
    return [Sample(each, hit_tokens, "load") for each in seconds]


def measured() -> Measured:
    loaded = {
        ("naive", 50.0): samples(1.0, 2.0, 1.0),
        ("naive", 200.0): samples(0.4, 0.4, 0.5),
        ("cachegen:low", 50.0): samples(0.5, 1.2, 0.5),
        ("cachegen:low", 200.0): samples(0.6, 0.6, 0.5),
        ("lz4", 50.0): samples(0.9, 1.8, 0.8),
        ("lz4", 200.0): samples(0.4, 0.3, 0.5, hit_tokens=100),
    }
    return Measured(40e6, samples(0.2), samples(5.0), loaded)


def test_a_link_that_passes_on_less_than_it_should_is_taken_for_what_it_is() -> None:
    found = measured()
    found.raw_bytes = 20e6
    assert [found.passed_on(speed) for speed in (50.0, 200.0)] == pytest.approx([25.0, 100.0])
    figures = report(LinkConfig(speeds=(50.0, 200.0)), environment(), found)
    assert [row[-1] for row in figures.rows] == ["-", "50", "100"]
    assert {"25", "100"} <= {element.text for element in ET.fromstring(drawing(figures)).iter()}


def test_codecs_are_compared_in_neighbours() -> None:
    found = report(LinkConfig(speeds=(50.0, 200.0)), environment(), measured(), ["a note"])
    assert found.ratios["cachegen:low_over_naive_50"] == pytest.approx(0.5)
    assert found.ratios["cachegen:low_over_naive_200"] == pytest.approx(1.5)
    assert [row[:3] for row in found.rows] == [
        ("naive", 1.0, 0.4),
        ("cachegen:low", 0.5, 0.6),
        ("lz4", 0.9, 0.4),
    ]
    assert [row[-1] for row in found.rows] == ["-", "100", "200"]
    assert found.notes[0] == "a note"
    assert "passed on 50 of 50 MB/s, 200 of 200 MB/s" in found.notes[1]
    assert found.notes[2:] == ("lz4 at 200 MB/s: 3 of 3 were not loaded",)
    assert found.samples["cachegen:low 50"] == [0.5, 1.2, 0.5]


def test_a_break_even_is_between_the_speeds_or_beyond() -> None:
    assert break_even({50.0: 0.5, 200.0: 1.5}) == "100", "half way on a logarithmic axis"
    assert break_even({50.0: 0.5, 200.0: 0.9, 1000.0: 1.0}) == "1000"
    assert break_even({50.0: 1.1, 200.0: 0.9}) == "< 50"
    assert break_even({50.0: 0.5, 200.0: 0.9}) == "> 200"


def test_the_plot_has_a_line_for_each_codec() -> None:
    drawn = drawing(report(LinkConfig(speeds=(50.0, 200.0)), environment(), measured()))
    texts = [element.text for element in ET.fromstring(drawn).iter()]
    assert {"cachegen:low", "lz4", "50", "200", "1"} <= {*texts}
    assert "naive" not in texts
    paths = [element.get("d", "") for element in ET.fromstring(drawn).iter()]
    assert sum("L" in path for path in paths) == 2


def test_tiers_are_named_after_their_codecs() -> None:
    assert tier_name("cachegen:level=low+aesgcm") == "cachegen-level-low-aesgcm"


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1800)
def test_a_small_run_loads_with_every_codec() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    config = LinkConfig(
        codecs=("floats", "cachegen:low", "floats+aesgcm"),
        prompt_tokens=300,
        prompts=1,
        repeats=1,
        speeds=(20.0,),
        pause_seconds=0,
        cache_dir=str(CACHE),
    )
    found = run(config)
    assert [row[0] for row in found.rows] == ["naive", "floats", "cachegen:low", "floats+aesgcm"]
    assert len(found.notes) == 1, "nothing was computed that should have been loaded"
    assert min(found.samples["recomputed"]) > 0
