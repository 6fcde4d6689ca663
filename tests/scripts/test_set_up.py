"""The set-up: stamps, what a machine lacks, failures in one line, interrupted installations."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """The script as a module, working in an empty folder."""
    spec = importlib.util.spec_from_file_location("set_up", SCRIPTS / "set_up.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "set_up", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "STAMPS", tmp_path)
    monkeypatch.setattr(module, "LOG", tmp_path / "log")
    (tmp_path / "log").touch()
    return module


def test_a_step_is_done_until_its_files_change(set_up, tmp_path):
    (tmp_path / "needs.txt").write_text("one")
    step = set_up.Step("step", "a step", (("-c", "pass"),), ("needs.txt",))
    assert not set_up.is_done(step)
    step.stamp.write_text(step.state)
    assert set_up.is_done(step)
    (tmp_path / "needs.txt").write_text("two")
    assert not set_up.is_done(step)


def test_the_model_is_made_again_when_it_was_removed(set_up, tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "MODEL", step := set_up.Step("model", "the model", ()))
    step.stamp.write_text(step.state)
    assert not set_up.is_done(step)
    folder = tmp_path / ".cache" / "models" / "SmolLM2-135M"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert set_up.is_done(step)


def test_a_missing_compiler_is_said(set_up, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(set_up.SetUpError, match="no C compiler"):
        set_up.check_machine("tools")


def test_too_little_room_is_said(set_up, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setitem(set_up.NEEDED_GB, "tools", 10**9)
    monkeypatch.setattr(set_up, "VLLM", set_up.Step("vllm", "vLLM", ()))
    with pytest.raises(set_up.SetUpError, match=f"GB free in {tmp_path}, 1000000000 GB are needed"):
        set_up.check_machine("tools")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "Collecting x\nERROR: Could not find a version that satisfies x\nERROR: No matching",
            "find a version",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "No space",
        ),
        ("Traceback ...\nkvstrata.testing.model.ModelError: the download failed", "the download failed"),
        ("something else", "something else"),
    ],
)
def test_a_failed_command_is_one_line(set_up, output, line):
    program = f"import sys; print({output!r}); sys.exit(3)"
    with set_up.LOG.open("a") as log, pytest.raises(set_up.SetUpError, match=line) as raised:
        set_up.run(log.fileno(), "installing x", (sys.executable, "-c", program))
    assert "\n" not in str(raised.value)
    assert "(all of it: log)" in str(raised.value)


def test_commands_that_run_at_once_both_count(set_up):
    with set_up.LOG.open("a") as log:
        set_up.run(log.fileno(), "x", (sys.executable, "-c", "print(1)"), (sys.executable, "-c", "print(2)"))
        with pytest.raises(set_up.SetUpError):
            set_up.run(
                log.fileno(), "x", (sys.executable, "-c", "raise KeyError"), (sys.executable, "-c", "")
            )


def test_an_old_python_is_said_in_one_line():
    result = subprocess.run(
        ["make", "--silent", "PYTHON=false", "setup-tools"],
        cwd=SCRIPTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "'false' is no Python 3.11 or newer" in result.stderr.splitlines()[0]


def test_unfinished_installations_are_forgotten(tmp_path):
    """A package whose files or record are missing is no longer seen as installed; whole ones stay."""
    for name, record in (("whole", "whole.py,,\n"), ("torn", "torn.py,,\ntorn/gone.py,,\n"), ("cut", None)):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (tmp_path / f"{name}.py").touch()
        if record is not None:
            (folder / "RECORD").write_text(record)
    program = (
        "import runpy, sys, sysconfig\n"
        "sysconfig.get_path = lambda name: sys.argv[1]\n"
        "runpy.run_path(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(SCRIPTS / "drop_unfinished.py")], check=True
    )
    assert [folder.name for folder in tmp_path.glob("*.dist-info")] == ["whole-1.0.dist-info"]
