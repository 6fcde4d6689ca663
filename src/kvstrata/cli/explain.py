"""``kvstrata explain``: why a request hit what it hit."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvstrata.cli.api import TokenFile, Url, connect
from kvstrata.cli.output import AsJson, print_json, print_table

EXAMPLE = "Example: kvstrata explain cmpl-1f0c --url http://127.0.0.1:8080"


def explain(
    request_id: Annotated[
        str | None,
        typer.Argument(
            metavar="REQUEST_ID", help="The engine's id of a recent request. Default: list the recent ones."
        ),
    ] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Say where a recent request was held, or why it was missing.

    Token range by token range.
    """
    api = connect(url, token_file)
    if request_id is None:
        recent = api.ask("GET", "/requests")
        if as_json:
            print_json(recent)
        else:
            _print_recent(recent)
        return
    found = api.ask("GET", f"/explain/{request_id}")
    if as_json:
        print_json(found)
    else:
        _print_one(found)


def _print_recent(recent: list[dict[str, Any]]) -> None:
    print_table(
        ("request", "tokens", "hit", "ms", "why it ended there"),
        [
            (
                each["request_id"],
                str(each["num_tokens"]),
                str(each["num_hit_tokens"]),
                f"{1000 * each['seconds']:.1f}",
                each["reason"] or "",
            )
            for each in recent
        ],
    )


def _print_one(found: dict[str, Any]) -> None:
    took = f"{1000 * found['seconds']:.1f} ms"
    hit = f"{found['num_hit_tokens']} of {found['num_tokens']} tokens hit"
    print(f"{found['request_id']} ({found['model_name']}): {hit}, after {took}: {found['detail']}")
    print_table(
        ("tokens", "state", "where or why"),
        [
            (
                f"{each['first_token']} - {each['first_token'] + each['num_tokens'] - 1}",
                each["state"],
                _place(each),
            )
            for each in found["ranges"]
        ],
    )
    for each in found["decisions"]:
        seconds = ", ".join(
            f"{name} {'unknown' if value is None else f'{value:.3f} s'}"
            for name, value in (
                ("loading estimated", each["load_seconds"]),
                ("computing estimated", each["prefill_seconds"]),
                ("loading took", each["actual_load_seconds"]),
            )
        )
        print(f"gate, {each['tier']}: {each['verdict']} {each['num_tokens']} tokens ({seconds})")
    for other in found["same_tokens"]:
        print(
            f"the first missing tokens are also held with another {', '.join(other['differs_in'])}: {other['key']}"
        )


def _place(each: dict[str, Any]) -> str:
    if each["state"] == "engine":
        return "the engine has them in its own prefix cache"
    held = f" (held by {', '.join(each['held_by'])})" if each["held_by"] else ""
    return str(each["tier"] or f"{each['reason']}{held}")
