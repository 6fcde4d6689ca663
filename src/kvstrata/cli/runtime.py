"""``kvstrata runtime``: what can be changed while a server runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvstrata.cli.api import (
    ApiClient,
    TokenFile,
    Url,
    connect,
)
from kvstrata.cli.output import AsJson, print_json, print_table
from kvstrata.cli.status import size
from kvstrata.config import GIB

EXAMPLE = "Example: kvstrata runtime --bypass redis --l1-budget-gb 10"


def runtime(
    l1_budget_gb: Annotated[
        float | None,
        typer.Option("--l1-budget-gb", metavar="GIB", min=0, help="Shrink or grow L1 in its pool."),
    ] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", metavar="LEVEL")] = None,
    gate: Annotated[
        str | None, typer.Option("--gate", metavar="auto|always|never", help="When tiers are loaded from.")
    ] = None,
    freeze_stores: Annotated[
        bool | None, typer.Option("--freeze-stores/--thaw-stores", help="Store nothing new; or do again.")
    ] = None,
    bypass: Annotated[
        list[str] | None, typer.Option("--bypass", metavar="TIER", help="Leave this tier alone.")
    ] = None,
    use: Annotated[list[str] | None, typer.Option("--use", metavar="TIER", help="Use it again.")] = None,
    ttl: Annotated[
        list[str] | None,
        typer.Option(
            "--ttl", metavar="TIER=SECONDS", help="Life of entries written from now on; 0 is for ever."
        ),
    ] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Change what can be changed while the server runs.

    Without options, print it. A restart undoes it.
    """
    body: dict[str, Any] = {
        "l1_budget_bytes": None if l1_budget_gb is None else int(l1_budget_gb * GIB),
        "log_level": None if log_level is None else log_level.upper(),
        "gate": gate,
        "stores_frozen": freeze_stores,
        "bypass": dict.fromkeys(bypass or [], True) | dict.fromkeys(use or [], False) or None,
    }
    if ttl:
        body["ttl_seconds"] = dict(map(_ttl, ttl))
    wanted = {name: value for name, value in body.items() if value is not None}
    api: ApiClient = connect(url, token_file)
    found = api.ask("PATCH", "/runtime", wanted) if wanted else api.ask("GET", "/runtime")
    if as_json:
        print_json(found)
        return
    rows = [(name, size(value) if name.endswith("_bytes") else _text(value)) for name, value in found.items()]
    print_table(("what", "value"), rows)


def _ttl(text: str) -> tuple[str, int | None]:
    name, _, seconds = text.rpartition("=")
    if not name or not seconds.isascii() or not seconds.isdigit():
        raise typer.BadParameter(f"--ttl {text}: expected TIER=SECONDS")
    return name, int(seconds) or None


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return (
            ", ".join(f"{name}={'never' if seconds is None else seconds}" for name, seconds in value.items())
            or "-"
        )
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
