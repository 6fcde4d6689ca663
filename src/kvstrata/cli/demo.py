"""``kvstrata demo``: the main job on a real vLLM, on this machine's CPU. What it does is in ``kvstrata.demo``."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec
import typer

from kvstrata.cli.output import FAULT, AsJson, print_json, print_table
from kvstrata.errors import PluginError

EXAMPLE = "Example: kvstrata demo --cache-dir .cache --report demo-report.json"


def demo(
    *,
    cache_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="For the model, which is made once, and for logs.")
    ] = Path(".cache"),
    report: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the figures are written as JSON.")
    ] = Path("demo-report.json"),
    prompt_tokens: Annotated[int, typer.Option(min=512, max=4000, help="Tokens of a prompt.")] = 2048,
    as_json: AsJson = False,
) -> int:
    """Show a real vLLM start warm from memory, Redis and disk.

    Needs the extra "demo" and vLLM (`make demo` installs both). Takes a few minutes; ends all that it started.
    The exit status is 1 when an answer differs from that of vLLM without connector, or a tier supplied nothing.
    """
    try:
        # Here, because its dependencies are extras that no other command needs.
        from kvstrata.demo.report import COLUMNS  # noqa: PLC0415
        from kvstrata.demo.run import run  # noqa: PLC0415
    except ImportError as error:
        raise PluginError(f"the demo needs {error.name}; run it with: make demo") from None
    with _ended_by_signals():
        outcome = run(cache_dir.resolve(), prompt_tokens=prompt_tokens, progress=_Progress())
    report.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    if as_json:
        print_json(outcome)
    else:
        print()
        print_table(COLUMNS, outcome.rows())
        print(f"\nwritten to {report}; every figure was measured in this run")
    for shortcoming in outcome.shortcomings():
        print(f"kvstrata demo: {shortcoming}", file=sys.stderr)
    return FAULT if outcome.shortcomings() else 0


class _Progress:
    """Prints what is going on, with the time since the start, to standard error."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:4.0f} s] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does, so that it stops what it started."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
