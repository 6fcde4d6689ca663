"""Commands and what they print, as a guide shows them: fenced ``console`` blocks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.M | re.S)


class Step(msgspec.Struct, frozen=True):
    """One command of a guide, and the output that it promises."""

    command: str
    expected: str
    """``...`` stands for anything within a line; a line of it alone for any lines."""

    def matches(self, output: str) -> bool:
        pattern = ".*".join(re.escape(part) for part in self.expected.rstrip().split("..."))
        pattern = re.sub(r"(^|\\\n)\.\*(?=\\\n|$)", r"\1(?s:.*)", pattern)
        return re.fullmatch(pattern, output.rstrip()) is not None

    def run(self, directory: Path, variables: Mapping[str, str]) -> None:
        """Run it in a shell as a reader would, with this installation's programs first, and compare."""
        bin_directory = str(Path(sys.executable).parent)
        env = {**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}", **variables}
        done = subprocess.run(  # noqa: S603  the commands are those of this repository's guides
            ["/bin/bash", "-c", self.command],
            cwd=directory,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert self.matches(done.stdout), (
            f"$ {self.command}\n{done.stdout}\n--- the guide says:\n{self.expected}"
        )


def steps(guide: Path, section: str = "") -> list[Step]:
    """The commands of a guide in order, those from the heading ``section`` on; lines joined, comments taken off."""
    found: list[Step] = []
    text = guide.read_text()
    for block in _BLOCK.findall(text[text.index(f"\n{section}\n") if section else 0 :]):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.M)[1:]:
            command, _, expected = part.partition("\n")
            found.append(Step(re.sub(r"\s{2,}# .*$", "", command).strip(), expected))
    return found
