"""docs/kserve.md: its overlay builds, makes the objects that it lists, and its settings are right."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvstrata.cli import main
from kvstrata.testing.transcripts import steps

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "kserve.md"


def test_the_overlay_makes_what_the_guide_lists(tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl") or shutil.which(str(Path(sys.executable).parent / "kubectl"))
    if kubectl is None:
        pytest.skip("needs the extra deploy")
    block = re.search(r"```yaml\n# my/kustomization.yaml\n(.*?)```", GUIDE.read_text(), re.S)
    assert block is not None
    shutil.copytree(ROOT / "deploy" / "kserve", tmp_path / "deploy" / "kserve")
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "kustomization.yaml").write_text(block[1])
    built = subprocess.run(
        [kubectl, "kustomize", tmp_path / "my"], capture_output=True, text=True, check=True
    )
    objects = list(yaml.safe_load_all(built.stdout))
    lines = []
    for each in objects:
        group, slash, _ = each["apiVersion"].partition("/")
        kind = each["kind"].lower() + (f".{group}" if slash else "")
        lines.append(f"{kind}/{each['metadata']['name']} created")
    (apply,) = [step for step in steps(GUIDE) if step.command == "kubectl apply -k my"]
    assert apply.expected.splitlines() == lines
    runtime, service = objects[-2], objects[-1]
    assert runtime["spec"]["containers"][0]["image"] == "registry.mine.net/vllm-kvstrata:0.32.0"
    assert service["spec"]["predictor"]["model"]["args"][0] == "--model=Qwen/Qwen3-8B"
    assert {each["metadata"]["namespace"] for each in objects} == {"inference"}


def test_its_settings_are_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (check,) = [step for step in steps(GUIDE) if step.command.startswith("kvstrata config check")]
    assert main(check.command.split()[1:]) == 0
    assert check.matches(capsys.readouterr().out)


def test_every_path_exists() -> None:
    text = GUIDE.read_text()
    for path in re.findall(r"(?<=[ /])deploy/(?:kserve|container)/[\w./-]+", text):
        assert (ROOT / path).exists(), path
