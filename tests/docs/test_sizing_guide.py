"""The figures of docs/sizing.md are what the command prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from kvstrata.cli import main
from kvstrata.testing.transcripts import Step, steps

GUIDE = Path(__file__).parents[2] / "docs" / "sizing.md"
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("step", steps(GUIDE), ids=lambda step: step.command[-40:])
def test_the_guide(
    step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Llama-3.1-8B").mkdir()
    (tmp_path / "Llama-3.1-8B" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(step.command)[1:]) == 0
    output = capsys.readouterr().out
    assert step.matches(output), output
