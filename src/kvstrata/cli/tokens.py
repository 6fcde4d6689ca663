"""Keys and token lists as options of commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

Tokens = Annotated[
    Path | None,
    typer.Option(
        "--tokens",
        metavar="FILE",
        help="JSON file with a list of token ids, or with what vLLM's POST /tokenize answers; '-': standard input.",
    ),
]

Keys = Annotated[list[str] | None, typer.Option("--key", metavar="KEY", help="May be given several times.")]


def read_tokens(file: Path) -> list[int]:
    """The token ids in a file.

    Raises:
        typer.BadParameter: it holds none.
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise typer.BadParameter(f"--tokens {file}: {error.strerror}") from None
    except ValueError:
        raise typer.BadParameter(f"--tokens {file}: not JSON") from None
    tokens = found.get("tokens") if isinstance(found, dict) else found
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens) or not tokens:
        raise typer.BadParameter(f"--tokens {file}: expected a list of token ids")
    return tokens
