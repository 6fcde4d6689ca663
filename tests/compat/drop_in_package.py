"""The drop-in, built and installed into a folder of its own: for child processes, and for nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "compat" / "lmcache"


@dataclass(frozen=True)
class DropIn:
    """An installed ``kvstrata-lmcache``."""

    folder: Path

    @classmethod
    def install(cls, folder: Path) -> DropIn:
        """Build the wheel and unpack it, without a network."""
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder), str(PROJECT)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return cls(folder)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in order to see it."""
        return {"PYTHONPATH": str(self.folder)}

    def command(self, name: str) -> str:
        """The path of one of its commands."""
        return str(self.folder / "bin" / name)

    def run(
        self, name: str, *arguments: str, timeout_seconds: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run one of its commands to its end."""
        return subprocess.run(
            [self.command(name), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
            env={**os.environ, **self.environment},
        )
