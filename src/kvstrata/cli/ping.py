"""``kvstrata ping``: does a server or a tier answer, and how fast?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvstrata.cli.api import TokenFile, connect
from kvstrata.cli.output import FAULT, AsJson, print_json
from kvstrata.client import RemoteClient
from kvstrata.config import mask, tier_from_url
from kvstrata.errors import ConfigError, ServerUnavailable, TierError
from kvstrata.tiers.base import PROBE_KEY
from kvstrata.tiers.inspect import opened_tier

EXAMPLE = "Example: kvstrata ping redis://127.0.0.1:6379 --count 5"

_TIMEOUT_SECONDS = 5.0


def ping(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="URL",
            help="A server (http://HOST:PORT, tcp://HOST:PORT, ipc://PATH) or a tier (redis://, file:// ...). "
            "Default: the HTTP API of the configuration.",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=1000, help="So many times.")] = 3,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> int:
    """Ask a server or a tier whether it answers. Exit status 1 when it does not."""
    name, error, seconds = _measure(target, count, token_file)
    if as_json:
        print_json({"target": name, "up": error is None, "seconds": seconds, "error": error})
    elif error is None:
        listed = ", ".join(f"{1000 * each:.2f}" for each in seconds)
        print(f"{name} answers: {listed} ms")
    else:
        print(f"{name} does not answer: {error}")
    return 0 if error is None else FAULT


def _measure(target: str | None, count: int, token_file: str | None) -> tuple[str, str | None, list[float]]:
    """What was asked, what went wrong, and how long each answer took."""
    seconds: list[float] = []
    name = mask(target) if target else ""
    with contextlib.ExitStack() as stack:
        name, ask = _opened(target, token_file, stack)
        try:
            for _ in range(count):
                started = time.monotonic()
                ask()
                seconds.append(time.monotonic() - started)
        except (TierError, ServerUnavailable) as error:
            return name, str(error).removeprefix(f"{name}: "), seconds
    return name, None, seconds


def _opened(
    target: str | None, token_file: str | None, stack: contextlib.ExitStack
) -> tuple[str, Callable[[], Any]]:
    scheme = "" if target is None else target.partition("://")[0].lower()
    if target is None or scheme in {"http", "https"}:
        api = connect(target, token_file, _TIMEOUT_SECONDS)
        return api.url, lambda: api.ask("GET", "/health")
    if scheme in {"tcp", "ipc"}:
        client = RemoteClient(target, "ping", timeout_seconds=_TIMEOUT_SECONDS, map_pool=False)
        stack.callback(client.close)

        def ask() -> None:
            if not client.wait_connected(_TIMEOUT_SECONDS) or not client.stats():
                raise ServerUnavailable(f"no answer within {_TIMEOUT_SECONDS:g} s")

        return target, ask
    if not scheme or "://" not in target:
        raise ConfigError(
            f"{target!r} is no URL: write http://{target}, or tcp://, ipc://, or that of a tier (redis://HOST:PORT)"
        )
    tier = stack.enter_context(opened_tier(tier_from_url(target)))
    return tier.describe(), lambda: tier.contains([PROBE_KEY])
