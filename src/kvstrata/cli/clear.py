"""``kvstrata clear``: drop what a server holds."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from kvstrata.cli.api import (
    Model,
    NoWait,
    Prefix,
    SaltOption,
    TierNames,
    TokenFile,
    Url,
    connect,
    follow,
    outcome,
)
from kvstrata.cli.output import FAULT, AsJson

EXAMPLE = "Example: kvstrata clear --tier l1 --yes"


Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def clear(
    tier: TierNames = None,
    prefix: Prefix = None,
    model: Model = None,
    salt: SaltOption = None,
    yes: Yes = False,
    url: Url = None,
    token_file: TokenFile = None,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> int:
    """Drop everything, or a part, from all tiers or some.

    A part is what is of a prefix, a model or a salt. Asks before it does.
    """
    given = {"prefix": prefix, "model_name": model, "salt": salt}
    # An option with an empty value, as of an unset variable, does not mean everything.
    scope = {name: value for name, value in given.items() if value is not None}
    what = ", ".join(f"{name} {value!r}" for name, value in scope.items()) or "everything"
    api = connect(url, token_file)
    if not yes:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter("nobody to ask: add --yes")
        if not typer.confirm(f"Drop {what} from {', '.join(tier or ['all tiers'])} of {api.url}?"):
            return FAULT
    body = {"tiers": tier or None}
    path = "/entries/delete" if scope else "/clear"
    job = api.ask("POST", path, body | scope)

    def tell(job: dict[str, Any]) -> str:
        parts = [f"{name} {count:,}" for name, count in job["result"].items()]
        return f"dropped: {', '.join(parts) or 'nothing'}"

    return outcome(follow(api, job, no_wait=no_wait, as_json=as_json, tell=tell))
