"""``kvstrata quota``: what each cache_salt may hold."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvstrata.cli.api import TokenFile, Url, connect
from kvstrata.cli.output import AsJson, print_json, print_table
from kvstrata.cli.status import size
from kvstrata.config import GIB

app = typer.Typer(
    help="See and set what each cache_salt may hold of l1 and of disks.",
    epilog="Example: kvstrata quota set acme --salt-file acme.salt --reserved-gb 4 --limit-gb 8",
    no_args_is_help=True,
)


QuotaName = Annotated[str, typer.Argument(metavar="NAME", help="As 'kvstrata quota list' shows it.")]


@app.command("list", epilog="Example: kvstrata quota list --json")
def list_quotas(url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """List quotas with what is held."""
    found = connect(url, token_file).ask("GET", "/quotas")
    if as_json:
        print_json({"quotas": found})
    else:
        _print(found)


@app.command("get", epilog="Example: kvstrata quota get acme")
def get(name: QuotaName, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """Show one quota. Exit status 1 when there is none of that name."""
    found = connect(url, token_file).ask("GET", f"/quotas/{name}")
    _show(found, as_json=as_json)


@app.command("set", epilog="Example: kvstrata quota set acme --tier disk --limit-gb 50")
def set_quota(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="What to call it; the salt, unless that is given. 'default': every other salt.",
        ),
    ],
    reserved_gb: Annotated[
        float | None, typer.Option("--reserved-gb", metavar="GIB", min=0, help="What others leave it.")
    ] = None,
    limit_gb: Annotated[
        float | None, typer.Option("--limit-gb", metavar="GIB", min=0, help="What it never exceeds.")
    ] = None,
    no_limit: Annotated[bool, typer.Option("--no-limit", help="Let it have as much as there is.")] = False,
    tier: Annotated[str, typer.Option("--tier", metavar="NAME", help="The tier that is meant.")] = "l1",
    salt_file: Annotated[
        typer.FileText | None,
        typer.Option("--salt-file", metavar="FILE", help="File with the cache_salt; '-' is standard input."),
    ] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Set a quota in one tier. What is not given stays as it is. A restart brings the configured quotas back."""
    if limit_gb is not None and no_limit:
        raise typer.BadParameter("give either --limit-gb or --no-limit")
    if reserved_gb is None and limit_gb is None and not no_limit:
        raise typer.BadParameter("say what to set: --reserved-gb, --limit-gb or --no-limit")
    api = connect(url, token_file)
    known = [row for each in api.ask("GET", "/quotas") if each["name"] == name for row in each["tiers"]]
    tiers = {row["tier"]: {key: row[key] for key in ("reserved_bytes", "limit_bytes")} for row in known}
    amounts = tiers.setdefault(tier, {"reserved_bytes": 0, "limit_bytes": None})
    if reserved_gb is not None:
        amounts["reserved_bytes"] = int(reserved_gb * GIB)
    if limit_gb is not None or no_limit:
        amounts["limit_bytes"] = None if limit_gb is None else int(limit_gb * GIB)
    body: dict[str, Any] = {"tiers": tiers}
    if salt_file is not None:
        body["salt"] = salt_file.read().rstrip("\r\n")
    found = api.ask("PUT", f"/quotas/{name}", body)
    _show(found, as_json=as_json)


@app.command("remove", epilog="Example: kvstrata quota remove acme")
def remove(name: QuotaName, url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """End a quota. What its salt holds stays, and competes with all others."""
    found = connect(url, token_file).ask("DELETE", f"/quotas/{name}")
    if as_json:
        print_json(found)
    else:
        print(f"removed {found['name']}")


def _show(quota: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(quota)
    else:
        _print([quota])


def _print(quotas: list[dict[str, Any]]) -> None:
    rows = [
        (
            quota["name"],
            row["tier"],
            size(row["used_bytes"]),
            size(row["reserved_bytes"]),
            "-" if row["limit_bytes"] is None else size(row["limit_bytes"]),
            f"{row['entries']:,}",
            f"{row['evictions']:,}",
            f"{row['refusals']:,}",
        )
        for quota in quotas
        for row in quota["tiers"]
    ]
    print_table(("quota", "tier", "used", "reserved", "limit", "entries", "evicted", "refused"), rows)
