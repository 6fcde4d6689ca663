"""The whole demo, as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstrata.cli import main

CACHE = Path(__file__).parents[2] / ".cache"


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_every_phase_is_a_hit_of_its_tier_with_the_answer_of_vllm_alone(tmp_path, capfd):
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    report = tmp_path / "demo-report.json"
    assert main(["demo", "--cache-dir", str(CACHE), "--report", str(report)]) == 0
    phases = {phase["name"]: phase for phase in json.loads(report.read_text())["phases"]}
    assert list(phases) == ["cold", "l1", "redis", "disk", "shared_prefix"]
    tokens = phases["cold"]["prompt_tokens"]
    assert phases["cold"]["hit_tokens"] == {"l1": 0, "redis": 0, "disk": 0}
    for name in ("l1", "redis", "disk"):
        hits = phases[name]["hit_tokens"]
        assert hits.pop(name) >= tokens - 1
        assert not any(hits.values())
    assert tokens // 2 - 256 < sum(phases["shared_prefix"]["hit_tokens"].values()) <= tokens // 2
    assert all(phase["answer_equal"] for phase in phases.values())
    assert "speed-up" in capfd.readouterr().out
