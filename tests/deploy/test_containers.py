"""The Containerfiles: a linter's opinion, and what it does not look at. They are not built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "container").glob("Containerfile.*"))


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def containerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def test_there_are_two() -> None:
    assert [path.name for path in FILES] == ["Containerfile.server", "Containerfile.vllm"]


def test_hadolint_has_nothing_to_say(containerfile: Path) -> None:
    hadolint = shutil.which("hadolint") or shutil.which(str(Path(sys.executable).parent / "hadolint"))
    if hadolint is None:
        pytest.skip("needs the extra deploy")
    done = subprocess.run([hadolint, "-f", "json", containerfile], capture_output=True, check=False)
    assert json.loads(done.stdout) == []


def test_runs_as_a_user_with_a_number(containerfile: Path) -> None:
    users = [argument for name, argument in instructions(containerfile) if name == "USER"]
    assert users[-1] == "10001:10001"  # by number: Kubernetes cannot tell whether a name is root's


def test_bases_are_pinned(containerfile: Path) -> None:
    bases = [argument for name, argument in instructions(containerfile) if name == "ARG"]
    for name, argument in instructions(containerfile):
        assert name != "FROM" or argument.startswith("${")
    for base in bases:
        tag = base.partition("=")[2].rpartition(":")[2]
        assert re.fullmatch(r"v?\d+\.\d+\.\d+.*", tag), base


def test_has_stages_a_health_check_and_no_secret(containerfile: Path) -> None:
    names = [name for name, _ in instructions(containerfile)]
    assert names.count("FROM") == 2
    assert names.count("HEALTHCHECK") == 1
    assert not re.search(r"(?i)(token|password|secret|api_key)\s*=", containerfile.read_text())


def test_what_is_copied_exists_and_is_not_ignored(containerfile: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name, argument in instructions(containerfile):
        if name == "COPY" and not argument.startswith("--from"):
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source.split('/')[0]}" in {line.rstrip("/") for line in ignored}


def test_lmcaches_names_are_in_both_images(containerfile: Path) -> None:
    assert ("COPY", "compat/lmcache compat/lmcache") in instructions(containerfile)
    assert any(
        name == "RUN" and "./compat/lmcache" in argument for name, argument in instructions(containerfile)
    )


def test_what_the_vllm_image_installs_is_what_its_first_stage_builds(tmp_path: Path) -> None:
    """The wheels of what it copies, as pip names them, are each found by one of its patterns."""
    steps = instructions(ROOT / "deploy" / "container" / "Containerfile.vllm")
    for name, argument in steps:
        if name == "COPY":
            *sources, target = argument.split()
            for source in sources:
                copied = ROOT / source
                place = tmp_path / "src" / (target if copied.is_dir() else source)
                place.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if copied.is_dir() else shutil.copy)(copied, place)
    (built,) = (argument for name, argument in steps if name == "RUN" and "pip wheel" in argument)
    command = built.replace("python3", sys.executable).replace("/wheels", str(tmp_path / "wheels"))
    subprocess.run(f"{command} --no-build-isolation -q", shell=True, cwd=tmp_path / "src", check=True)
    (installed,) = (argument for name, argument in steps if name == "RUN" and "pip install" in argument)
    patterns = re.findall(r"/wheels/(\S+?\.whl)", installed)
    found = [[path.name for path in (tmp_path / "wheels").glob(pattern)] for pattern in patterns]
    assert [len(names) for names in found] == [1, 1]
    assert [names[0].split("-")[0] for names in found] == ["kvstrata", "kvstrata_lmcache"]


@pytest.mark.parametrize("has_lmcache", [False, True])
def test_lmcache_itself_is_not_overwritten(tmp_path: Path, has_lmcache: bool) -> None:
    """The condition of the vLLM image, with a pip that only says what it was asked for."""
    steps = instructions(ROOT / "deploy" / "container" / "Containerfile.vllm")
    (installed,) = (argument for name, argument in steps if name == "RUN" and "pip install" in argument)
    condition = re.search(r"if .* fi", installed)
    assert condition is not None
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\ncase "$*" in *show*) exit {0 if has_lmcache else 1};; esac\necho "$*"\n')
    python.chmod(0o755)
    done = subprocess.run(
        condition[0],
        shell=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        check=True,
        text=True,
    )
    assert ("kvstrata_lmcache" in done.stdout) is not has_lmcache


def test_the_server_image_has_no_torch() -> None:
    text = (ROOT / "deploy" / "container" / "Containerfile.server").read_text()
    assert "torch" not in re.sub(r"(?m)^#.*$", "", text)
    extras = re.search(r"'\.\[(.*)\]'", text)
    declared = (ROOT / "pyproject.toml").read_text()
    assert extras is not None
    assert all(re.search(rf"(?m)^{extra} = \[", declared) for extra in extras[1].split(","))
