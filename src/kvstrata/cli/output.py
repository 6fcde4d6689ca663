"""What commands share: the option ``--json``, tables, notices, the exit status of a fault."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

FAULT = 1
"""Exit status: what was asked for was not done, or not found."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file to read instead of $KVSTRATA_CONFIG_FILE."),
]


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON."""
    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of columns, each as wide as its widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns, each as wide as its widest cell."""
    print("\n".join(table_lines(header, rows)))


def print_notices(notices: Iterable[str]) -> None:
    """Print what has no effect in a configuration, to standard error."""
    for notice in notices:
        print(f"kvstrata: note: {notice}", file=sys.stderr)
