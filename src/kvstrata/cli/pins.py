"""``kvstrata pin``, ``unpin`` and ``pins``: what stays in L1."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvstrata.cli.api import (
    Model,
    Prefix,
    SaltOption,
    TokenFile,
    Url,
    connect,
)
from kvstrata.cli.output import FAULT, AsJson, print_json, print_table
from kvstrata.cli.status import duration, size
from kvstrata.cli.tokens import Keys, Tokens, read_tokens

PIN_EXAMPLE = "Example: kvstrata pin --owner ann --seconds 86400 --tokens prompt.json --model org/model"
UNPIN_EXAMPLE = "Example: kvstrata unpin --owner ann"
PINS_EXAMPLE = "Example: kvstrata pins --json"


def pin(
    owner: Annotated[str, typer.Option("--owner", help="Who wants it.")],
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Then the pin ends by itself.")] = 3600,
    key: Keys = None,
    tokens: Tokens = None,
    prefix: Prefix = None,
    model: Model = None,
    salt: SaltOption = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> int:
    """Keep entries of L1 from being evicted.

    What L1 holds of keys, a token list, a prefix, a model or a salt.

    Exit status 1 when a part of it is not in L1; 'kvstrata warm' brings it there.
    """
    if not (key or tokens or prefix or model or salt):
        raise typer.BadParameter("say what to pin: --key, --tokens, --prefix, --model or --salt")
    body: dict[str, Any] = {"keys": key or None, "prefix": prefix, "model_name": model, "salt": salt}
    body |= {"owner": owner, "seconds": seconds, "tokens": None if tokens is None else read_tokens(tokens)}
    found = connect(url, token_file).ask("POST", "/pins", body)
    if as_json:
        print_json(found)
    else:
        missing = f"; {found['num_not_held']:,} are not in L1" if found["num_not_held"] else ""
        print(
            f"pin {found['id']}: {found['num_entries']:,} entries, {size(found['payload_bytes'])}, "
            f"for {duration(found['seconds_left'])}{missing}"
        )
    return FAULT if found["num_not_held"] else 0


def unpin(
    pin_id: Annotated[str | None, typer.Argument(metavar="ID", help="As 'kvstrata pins' shows it.")] = None,
    owner: Annotated[str | None, typer.Option("--owner", help="All pins of this owner.")] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> int:
    """End a pin, or all of an owner. Exit status 1 when there is none."""
    if (pin_id is None) == (owner is None):
        raise typer.BadParameter("give either ID or --owner")
    api = connect(url, token_file)
    if pin_id is not None:
        ended = [api.ask("DELETE", f"/pins/{pin_id}")]
    else:
        ended = api.ask("DELETE", "/pins", query={"owner": owner})
    if as_json:
        print_json({"unpinned": ended})
    else:
        print(f"unpinned {len(ended)}: {sum(each['num_entries'] for each in ended):,} entries")
    return 0 if ended else FAULT


def pins(url: Url = None, token_file: TokenFile = None, as_json: AsJson = False) -> None:
    """List what is pinned."""
    found = connect(url, token_file).ask("GET", "/pins")
    if as_json:
        print_json({"pins": found})
        return
    rows = [
        (
            each["id"],
            each["owner"],
            f"{each['num_entries']:,}",
            size(each["payload_bytes"]),
            duration(each["seconds_left"]),
        )
        for each in found
    ]
    print_table(("id", "owner", "entries", "size", "left"), rows)
