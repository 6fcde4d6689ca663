"""``kvstrata jobs``: long operations of a server."""

from __future__ import annotations

from typing import Annotated

import typer

from kvstrata.cli.api import (
    TokenFile,
    Url,
    connect,
)
from kvstrata.cli.output import AsJson, print_json, print_table
from kvstrata.cli.status import duration

EXAMPLE = "Example: kvstrata jobs --cancel 1f2e3d4c5b6a7988"


def jobs(
    cancel: Annotated[str | None, typer.Option("--cancel", metavar="ID", help="Let this one stop.")] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """List long operations, the latest first; or cancel one."""
    api = connect(url, token_file)
    if cancel is not None:
        api.ask("DELETE", f"/jobs/{cancel}")
    found = api.ask("GET", "/jobs")
    if as_json:
        print_json({"jobs": found})
        return
    rows = [
        (
            job["id"],
            job["kind"],
            job["state"],
            f"{job['num_done']:,}",
            duration(job["seconds"]),
            job["error"] or "",
        )
        for job in found
    ]
    print_table(("id", "kind", "state", "done", "took", "error"), rows)
