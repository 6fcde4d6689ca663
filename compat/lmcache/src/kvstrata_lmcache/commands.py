"""LMCache's commands, as kvstrata's. Which becomes which stands in ``kvstrata.config.lmcache``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from kvstrata.cli import main as kvstrata
from kvstrata.config.lmcache import LMCACHE_COMMANDS
from kvstrata.distributions import lmcache_conflict
from kvstrata_lmcache import engine
from kvstrata_lmcache.parser import USAGE, OneLineParser
from kvstrata_lmcache.server import server_arguments

FAULT = 1

_HELP = """\
usage: lmcache COMMAND [OPTIONS]

LMCache's commands, provided by kvstrata. Each takes the options of the command that it stands for too
('kvstrata COMMAND --help').
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``lmcache``; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return _unless_conflict(lambda: _dispatch(given))


def remote(arguments: Sequence[str] | None = None) -> int:
    """The commands ``lmcache_server`` and ``lmcache_experimental_server``: ``kvstrata remote``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return _unless_conflict(lambda: kvstrata(["remote", *given]))


def controller() -> int:
    """The command ``lmcache_controller``, which there is nothing for."""
    return _unless_conflict(lambda: _run("lmcache_controller", []))


def _unless_conflict(run: Callable[[], int]) -> int:
    conflict = lmcache_conflict()
    if conflict is not None:
        print(f"lmcache: {conflict}", file=sys.stderr)
        return FAULT
    try:
        return run()
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a file for --output, say
        print(f"lmcache: {error.filename}: {error.strerror}", file=sys.stderr)
    return FAULT


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_HELP)
        for name, command in LMCACHE_COMMANDS.items():
            if name.startswith("lmcache ") and command.fate != "not supported":
                print(f"  {name:26}{command.note.replace('`', '')}")
        return 0 if given else USAGE
    for words in (2, 1):
        name = " ".join(["lmcache", *given[:words]])
        if name in LMCACHE_COMMANDS:
            return _run(name, given[words:])
    listed = ", ".join(name.removeprefix("lmcache ") for name in LMCACHE_COMMANDS if " " in name)
    print(f"lmcache: no command {' '.join(given[:2])!r}; LMCache has {listed}", file=sys.stderr)
    return USAGE


def _run(name: str, given: list[str]) -> int:
    command = LMCACHE_COMMANDS[name]
    if command.fate == "not supported":
        print(f"{name}: not provided by kvstrata: {command.note.replace('`', '')}", file=sys.stderr)
        return USAGE
    match name:
        case "lmcache server":
            return kvstrata(["server", *server_arguments(given)])
        case "lmcache ping engine":
            return engine.ping(given)
        case "lmcache query engine":
            return engine.query(given)
        case _:
            ours = command.note.split()[1:]
            return _mapped(name, ours, given)


def _mapped(name: str, ours: list[str], given: list[str]) -> int:
    """Run our command, with LMCache's options for output and address as ours."""
    parser = OneLineParser(prog=name, allow_abbrev=False, add_help=False)
    parser.add_argument("--url")
    parser.add_argument("--format", choices=("terminal", "json"))
    parser.add_argument("--output")
    parser.add_argument("-q", "--quiet", action="store_true")
    known, others = parser.parse_known_args(given)
    arguments = [*ours, *others]
    if known.url is not None:
        url = known.url if "://" in known.url else f"http://{known.url}"
        arguments += [url] if ours == ["ping"] else ["--url", url]
    if known.format == "json":
        arguments += ["--json", "-"] if ours[0] == "bench" else ["--json"]
    target = os.devnull if known.quiet else known.output
    if target is None:
        return kvstrata(arguments)
    with open(target, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):  # noqa: PTH123
        return kvstrata(arguments)
