"""docs/troubleshooting.md: the symptoms, brought about; those of an engine in deploy/test_model_pod.py."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvstrata.testing.process import free_port
from kvstrata.testing.transcripts import Step, steps

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = DOCS / "troubleshooting.md"
OF_AN_ENGINE = {step.command for step in steps(GUIDE, "## No hits")}


@pytest.mark.parametrize(
    "step",
    [step for step in steps(GUIDE) if step.command not in OF_AN_ENGINE],
    ids=lambda step: step.command[:40],
)
def test_the_guide(step: Step, tmp_path: Path) -> None:
    (tmp_path / "redis.conf").write_text("maxmemory 80Gi\nmaxmemory-policy allkeys-lru\n")
    (tmp_path / "values.yaml").write_text("lmcache:\n  enabled: true\n  maxMemory: 80Gi\n")
    step.run(tmp_path, {"KVSTRATA_MAX_LOCAL_CPU_SIZE": "0.1"})


@pytest.mark.system
def test_redis_says_what_the_heading_says(tmp_path: Path) -> None:
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("needs redis-server of the system")
    (tmp_path / "redis.conf").write_text(f"bind 127.0.0.1\nport {free_port()}\nmaxmemory 80Gi\n")
    done = subprocess.run(
        [server, "redis.conf"], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert "argument must be a memory value" in done.stdout + done.stderr
    assert "## Redis does not start: `argument must be a memory value`" in GUIDE.read_text()


@pytest.mark.parametrize("name", ["verify", "troubleshooting", "upgrade", "sizing", "kserve", "kubernetes"])
def test_links_lead_somewhere(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    for target, _, heading in re.findall(r"\]\(([\w./-]*)(#([\w-]+))?\)", text):
        file = DOCS / target if target else DOCS / f"{name}.md"
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
        slugs = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
        assert not heading or heading in slugs, (target, heading)
