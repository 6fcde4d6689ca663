"""Commands and what they print, as a guide shows them: fenced ``console`` blocks."""

from __future__ import annotations

import re
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


def steps(guide: Path) -> list[Step]:
    """All commands of a guide, in order; continued lines joined, comments taken off."""
    found: list[Step] = []
    for block in _BLOCK.findall(guide.read_text()):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.M)[1:]:
            command, _, expected = part.partition("\n")
            found.append(Step(re.sub(r"\s{2,}# .*$", "", command).strip(), expected))
    return found
