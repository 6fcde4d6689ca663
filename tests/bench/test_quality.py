"""The quality harness, on a small random model."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from kvstrata.bench.passages import LENGTHS, fingerprint, passages
from kvstrata.bench.plot import Point, scatter
from kvstrata.bench.quality import Outcome, QualityConfig, drawing, figures_of, run, through
from kvstrata.cli import main
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import open_codec
from kvstrata.errors import ConfigError
from kvstrata.testing.model import tiny_llama


def words(text: str) -> list[int]:
    """A tokenizer for tests: about as many tokens as a real one."""
    return [ord(character) for character in text[::4]]


def outcome(nll: float, change: float, greedy_same: int = 8) -> Outcome:
    return Outcome(nll, change, abs(change), greedy_same / 8, greedy_same, 400, 100)


def test_passages_share_nothing_and_are_the_same_on_every_run() -> None:
    found = passages(words, 50, 128)
    assert [len(each.prompt) + len(each.rest) for each in found] == [*LENGTHS] * 10
    assert {len(each.rest) for each in found} == {128}
    assert len({each.prompt[:64] for each in found}) == 50
    assert fingerprint(found) == fingerprint(passages(words, 50, 128)) != fingerprint(found[:49])
    with pytest.raises(ConfigError, match="1000 passages take"):
        passages(words, 1000, 128)


@pytest.mark.parametrize("tokens", [1, 128, 256, 300, 520])
def test_kv_goes_through_frames_chunk_by_chunk(tokens: int) -> None:
    kv = np.random.default_rng(tokens).integers(0x3F00, 0x4100, (2, 2, tokens, 3, 64), dtype=np.uint16)
    for codec in (NaiveCodec(), open_codec("floats")):
        found, raw_bytes, stored_bytes = through(codec, kv)
        assert np.array_equal(found, kv)
        assert raw_bytes == -(-tokens // 128) * 128 * 2 * 2 * 3 * 64 * 2
        assert stored_bytes == raw_bytes if codec.passthrough else stored_bytes < raw_bytes


def test_figures_are_those_of_all_passages_and_the_worst() -> None:
    same = figures_of([outcome(2.0, 0.0), outcome(3.0, 0.0)], seed=0)
    assert (same.nll_change_percent, same.low, same.high, same.worst, same.kl) == (0, 0, 0, 0, 0)
    of = figures_of([outcome(2.0, 0.02), outcome(4.0, 0.1, greedy_same=2), outcome(4.0, -0.02)], seed=0)
    assert of.size == 4
    assert of.nll_change_percent == pytest.approx(1.0)
    assert of.worst == pytest.approx(2.5)
    assert of.low < of.nll_change_percent < of.high <= of.worst + 1e-9
    assert (of.worst_same_top, of.worst_greedy, of.worst_kl) == (25, 2, 0.1)
    assert figures_of([outcome(2.0, 0.02), outcome(4.0, 0.1)], 1) == figures_of(
        [outcome(2.0, 0.02), outcome(4.0, 0.1)], 1
    )


def test_plots_are_documents_with_every_point() -> None:
    points = [Point("a<b", 4.5, 0.6, -0.1, 1.2), Point("zero", 1, 0, 0, 0)]
    texts = [element.text for element in ET.fromstring(scatter("A & B", points, "x", "y")).iter()]
    assert {"A & B", "a<b", "zero", "x", "y"} <= {*texts}
    ET.fromstring(scatter("nothing moves", points[1:], "x", "y"))


def test_lossless_codecs_change_nothing_and_lossy_ones_are_measured() -> None:
    """Exactly nothing: the model computes the same from the same KV."""
    pytest.importorskip("transformers", reason="transformers is not installed: make setup")
    model = tiny_llama(Path(".cache").resolve())
    config = QualityConfig(
        codecs=("naive", "floats", "cachegen:low"),
        passages=1,
        rest_tokens=32,
        greedy_tokens=8,
        model=str(model),
    )
    report = run(config)
    rows = {row[0]: dict(zip(report.columns, row, strict=True)) for row in report.rows}
    for name in ("naive", "floats"):
        row = rows[name]
        zeros = (row["nll_change_percent"], row["low"], row["high"], row["worst"], row["kl"], row["worst_kl"])
        assert zeros == (0,) * 6
        assert (row["same_top_percent"], row["greedy_same"]) == (100, 8)
    lossy = rows["cachegen:low"]
    assert lossy["size"] > 3.5
    assert lossy["kl"] > 0
    assert report.ratios["naive_size"] == 1
    assert report.ratios["naive_nll_change_percent"] == 0
    assert not {"naive_nll_change_percent", "floats_nll_change_percent"} & {*report.missed}
    assert "cachegen:low" in drawing(report)


def test_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", "--codec", "cachegem"]) == 2
    assert "cachegen" in capsys.readouterr().err
