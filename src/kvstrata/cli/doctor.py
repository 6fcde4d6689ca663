"""``kvstrata doctor``: check a machine and a configuration before production."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvstrata.cli.output import FAULT, AsJson, ConfigFile, print_json
from kvstrata.doctor import Level, examine

EXAMPLE = "Example: kvstrata doctor --config kvstrata.yaml values.yaml"


def doctor(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE", help="A chart's values or a redis.conf: looks for units Redis lacks."),
    ] = None,
    skip_engine: Annotated[
        bool, typer.Option("--skip-engine", help="Do not import vLLM, which takes seconds.")
    ] = False,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="PATH", help="Its config.json: is it cached, does it fit?"),
    ] = None,
    config_file: ConfigFile = None,
    as_json: AsJson = False,
) -> int:
    """Check this machine, the configuration and its tiers.

    Says for each finding what to do.

    Looks only, writes nothing. Exit status 1 when there is an error.
    """
    found = []
    for finding in examine(config_file, files or (), engine=not skip_engine, model=model):
        found.append(finding)
        if not as_json:
            print(f"{finding.level:<8} {finding.check}: {finding.found}")
            if finding.remedy:
                print(f"         -> {finding.remedy}")
    counts = {level: sum(finding.level is level for finding in found) for level in Level}
    if as_json:
        print_json({"findings": found, "counts": counts})
    else:
        print(f"{counts[Level.ERROR]} errors, {counts[Level.WARNING]} warnings")
    return FAULT if counts[Level.ERROR] else 0
