"""The command ``kvstrata``: its sub-commands, and how errors leave it.

Exit status: 0 done, 1 a fault (a server or tier that does not answer, a key that is not held), 2 wrong usage
or configuration, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, cast

import typer

from kvstrata.__about__ import __version__
from kvstrata.cli import (
    bench,
    clear,
    config,
    demo,
    doctor,
    explain,
    jobs,
    keys,
    metrics,
    ping,
    pins,
    quota,
    remote,
    runtime,
    server,
    size,
    status,
    verify,
    version,
    warm,
)
from kvstrata.cli.output import FAULT
from kvstrata.errors import ConfigError, KVStrataError, PluginError

OK, USAGE, INTERRUPTED = 0, 2, 130

# The base of all usage errors. Taken from here because newer versions of typer bring their own click.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    name="kvstrata",
    help="A KV cache layer for LLM inference: run its server, look at its configuration and its tiers.",
    epilog="Example: kvstrata server --l1-size-gb 20 --eviction-policy LRU --chunk-size 256",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("server", epilog=server.EXAMPLE)(server.server)
app.command("remote", epilog=remote.EXAMPLE)(remote.remote)
app.add_typer(bench.app, name="bench")
app.add_typer(config.app, name="config")
app.add_typer(keys.app, name="keys")
app.add_typer(metrics.app, name="metrics")
app.add_typer(quota.app, name="quota")
app.command("status", epilog=status.EXAMPLE)(status.status)
app.command("tiers", epilog=status.TIERS_EXAMPLE)(status.tiers)
app.command("explain", epilog=explain.EXAMPLE)(explain.explain)
app.command("clear", epilog=clear.EXAMPLE)(clear.clear)
app.command("pin", epilog=pins.PIN_EXAMPLE)(pins.pin)
app.command("unpin", epilog=pins.UNPIN_EXAMPLE)(pins.unpin)
app.command("pins", epilog=pins.PINS_EXAMPLE)(pins.pins)
app.command("warm", epilog=warm.EXAMPLE)(warm.warm)
app.command("verify", epilog=verify.EXAMPLE)(verify.verify)
app.command("jobs", epilog=jobs.EXAMPLE)(jobs.jobs)
app.command("runtime", epilog=runtime.EXAMPLE)(runtime.runtime)
app.command("size", epilog=size.EXAMPLE)(size.size)
app.command("ping", epilog=ping.EXAMPLE)(ping.ping)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("version", epilog=version.EXAMPLE)(version.version)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvstrata {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status. ``arguments`` are those of the process when None."""
    command = typer.main.get_command(app)
    args = None if arguments is None else list(arguments)
    try:
        status = command.main(args=args, prog_name="kvstrata", standalone_mode=False)
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except (_UsageError, KVStrataError, OSError, typer.Abort, KeyboardInterrupt) as error:
        message, failed = _outcome(error)
        print(message, file=sys.stderr)
        return failed
    return status if isinstance(status, int) else OK


def _outcome(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    match error:
        case _UsageError():
            text = str(getattr(error, "format_message", error.__str__)())
            if text.startswith("Usage:"):  # no arguments given: the text is the help
                return text, USAGE
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "kvstrata"
            return f"kvstrata: {' '.join(text.split())} (see '{path} --help')", USAGE
        case ConfigError() | PluginError():
            return f"kvstrata: {error}", USAGE
        case KVStrataError() | OSError():
            return f"kvstrata: {error}", FAULT
        case _:
            return "kvstrata: interrupted", INTERRUPTED
