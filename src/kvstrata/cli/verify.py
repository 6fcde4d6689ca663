"""``kvstrata verify``: check what is stored."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvstrata.cli.api import (
    Model,
    NoWait,
    Prefix,
    TierNames,
    TokenFile,
    Url,
    connect,
    follow,
    outcome,
)
from kvstrata.cli.output import FAULT, AsJson

EXAMPLE = "Example: kvstrata verify --tier redis --sample 1000"


def verify(
    tier: TierNames = None,
    prefix: Prefix = None,
    model: Model = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="So many entries per tier, at random. Default: all.")
    ] = None,
    delete_bad: Annotated[bool, typer.Option("--delete-bad", help="Delete what is bad.")] = False,
    url: Url = None,
    token_file: TokenFile = None,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> int:
    """Check the checksums of stored entries. Exit status 1 when one is bad."""
    api = connect(url, token_file)
    body = {"tiers": tier or None, "prefix": prefix, "model_name": model, "sample": sample}
    job = api.ask("POST", "/verify", body | {"delete_bad": delete_bad})

    def tell(job: dict[str, Any]) -> str:
        lines = []
        for name, figures in job["result"].items():
            unsealed = f", {figures['unsealed']:,} without a checksum yet" if figures.get("unsealed") else ""
            lines.append(f"{name}: {figures['checked']:,} checked, {figures['bad']:,} bad{unsealed}")
            lines += [f"  {bad['key']}: {bad['fault']}" for bad in figures["bad_keys"]]
        return "\n".join(lines)

    job = follow(api, job, no_wait=no_wait, as_json=as_json, tell=tell)
    bad = sum(figures["bad"] for figures in job["result"].values())
    return outcome(job) or (FAULT if bad else 0)
