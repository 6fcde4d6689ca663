"""``lmcache ping engine`` and ``lmcache query engine``: requests to an inference engine's own API."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from kvstrata.testing.process import ServerFailed
from kvstrata.testing.vllm_client import VLLMClient
from kvstrata_lmcache.parser import OneLineParser

FAULT = 1
_DEFAULT_URL = "http://localhost:8000"


def ping(given: list[str]) -> int:
    """Whether the engine answers; exit status 1 when it does not."""
    parser = _parser("lmcache ping engine", _DEFAULT_URL)
    options = parser.parse_args(given)
    client = _client(parser, options.url)
    started = time.monotonic()
    up = client.healthy()
    seconds = time.monotonic() - started
    _show({"target": client.url, "up": up, "seconds": seconds}, options)
    if not up:
        print(f"{parser.prog}: no engine answers at {client.url}", file=sys.stderr)
    return 0 if up else FAULT


def query(given: list[str]) -> int:
    """One completion with its times; exit status 1 when there is no answer."""
    parser = _parser("lmcache query engine", None)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--completions", action="store_true", help="What is asked for anyway.")
    options = parser.parse_args(given)
    client = _client(parser, options.url)
    try:
        client.model_name = options.model or _first_model(client)
        answer = client.complete(
            options.prompt, max_tokens=options.max_tokens, timeout_seconds=options.timeout
        )
    except (OSError, ServerFailed) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return FAULT
    found = {
        "model": client.model_name,
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "output_tokens": len(answer.token_ids),
        "ttft_seconds": answer.ttft_seconds,
        "total_seconds": answer.total_seconds,
    }
    _show(found, options)
    return 0


def _first_model(client: VLLMClient) -> str:
    status, body = client.request("GET", "/v1/models")
    if status != 200:
        raise ServerFailed(f"{client.url}/v1/models answers {status}; give --model")
    name: str = json.loads(body)["data"][0]["id"]
    return name


def _parser(prog: str, default_url: str | None) -> OneLineParser:
    parser = OneLineParser(prog=prog)
    parser.add_argument("--url", default=default_url, required=default_url is None)
    parser.add_argument("--format", choices=("terminal", "json"), default="terminal")
    parser.add_argument("-q", "--quiet", action="store_true")
    return parser


def _client(parser: OneLineParser, url: str) -> VLLMClient:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host = None
    if host is None or parts.scheme != "http":
        parser.error(f"--url {url!r}: expected http://HOST:PORT")
    return VLLMClient(host, port, "")


def _show(found: dict[str, Any], options: argparse.Namespace) -> None:
    if options.quiet:
        return
    if options.format == "json":
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        print(f"{name.replace('_', ' '):15}{shown}")
