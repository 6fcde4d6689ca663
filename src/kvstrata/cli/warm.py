"""``kvstrata warm``: bring entries to L1 ahead of requests."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvstrata.cli.api import (
    Model,
    NoWait,
    SaltOption,
    TokenFile,
    Url,
    connect,
    follow,
    outcome,
)
from kvstrata.cli.output import FAULT, AsJson
from kvstrata.cli.status import size
from kvstrata.cli.tokens import Keys, Tokens, read_tokens

EXAMPLE = "Example: kvstrata warm --tokens system-prompt.json --model org/model"


def warm(
    key: Keys = None,
    tokens: Tokens = None,
    model: Model = None,
    namespace: Annotated[
        str | None,
        typer.Option("--namespace", metavar="FINGERPRINT", help="As GET /namespaces lists it, or its begin."),
    ] = None,
    salt: SaltOption = None,
    url: Url = None,
    token_file: TokenFile = None,
    no_wait: NoWait = False,
    as_json: AsJson = False,
) -> int:
    """Bring keys or a token list to L1 ahead of requests.

    Exit status 1 when a part of it could not be brought.
    """
    if bool(key) == (tokens is not None):
        raise typer.BadParameter("give either --key or --tokens")
    body: dict[str, Any] = {"keys": key or None, "model_name": model, "salt": salt or ""}
    body["namespace"] = namespace
    if tokens is not None:
        body["prompts"] = [read_tokens(tokens)]
    api = connect(url, token_file)

    def tell(job: dict[str, Any]) -> str:
        result = job["result"]
        return (
            f"{result['loaded']:,} entries loaded ({size(result['loaded_bytes'])}), "
            f"{result['already_in_l1']:,} were in L1, {result['not_held']:,} held nowhere, "
            f"{result['failed']:,} failed, {result['no_room']:,} had no room"
        )

    job = follow(api, api.ask("POST", "/warm", body), no_wait=no_wait, as_json=as_json, tell=tell)
    lost = sum(job["result"].get(name, 0) for name in ("not_held", "failed", "no_room"))
    return outcome(job) or (FAULT if lost else 0)
