"""Asking a server's HTTP API: what the commands that operate it share."""

from __future__ import annotations

import http.client
import ipaddress
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode, urlsplit

import typer

from kvstrata.cli.output import FAULT, print_json
from kvstrata.config import load_settings
from kvstrata.errors import ConfigError, KVStrataError, ServerUnavailable

DEFAULT_PORT = 8080
_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.2

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="The server's HTTP API. Default: http_host and http_port of the configuration, "
        f"else http://127.0.0.1:{DEFAULT_PORT}.",
    ),
]
TokenFile = Annotated[
    str | None,
    typer.Option("--token-file", metavar="FILE", help="File with the API's token. Default: http_token_file."),
]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Print the job and return at once; see it with 'kvstrata jobs'.")
]
TierNames = Annotated[
    list[str] | None,
    typer.Option("--tier", metavar="NAME", help="Only this tier; may be given several times."),
]
Prefix = Annotated[str | None, typer.Option("--prefix", help="Entries whose key begins so.")]
Model = Annotated[str | None, typer.Option("--model", metavar="NAME", help="Entries of this model.")]


def _salt(given: str | None) -> str | None:
    return sys.stdin.read().rstrip("\r\n") if given == "-" else given


SaltOption = Annotated[
    str | None,
    typer.Option(
        "--salt",
        metavar="SALT|-",
        callback=_salt,
        help="Entries of this cache_salt; '-' is standard input, which no list of processes shows.",
    ),
]


class ApiError(KVStrataError):
    """The server refused a request; the message is what it said."""


class ApiClient:
    """One server's HTTP API."""

    def __init__(self, url: str, token: str | None = None, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        """Nothing is opened yet. ``timeout_seconds`` bounds each wait for the server.

        Raises:
            ConfigError: ``url`` is not one of HTTP.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
            raise ConfigError(f"--url {url!r} is not allowed: expected http://HOST:PORT")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._is_tls = parts.scheme == "https"
        self._host, self._port, self._base = parts.hostname, port, parts.path.rstrip("/")
        self._token = token
        self._timeout_seconds = timeout_seconds

    def ask(self, method: str, path: str, body: Any = None, query: dict[str, Any] | None = None) -> Any:
        """Send a request, return the answer's JSON.

        Raises:
            ServerUnavailable: nothing, or something else, answers there.
            ApiError: the server refuses.
        """
        wanted = {name: value for name, value in (query or {}).items() if value is not None}
        target = self._base + quote(path) + (f"?{urlencode(wanted)}" if wanted else "")
        status, text = self._send(method, target, None if body is None else json.dumps(body).encode())
        try:
            answer = json.loads(text)
        except ValueError:
            raise ServerUnavailable(
                f"{self.url} answers, but not as a kvstrata server does ({status})"
            ) from None
        if status >= 400 and not (status == 503 and "tiers" in answer):
            detail = answer.get("detail", "") if isinstance(answer, dict) else ""
            hint = " (--token-file FILE)" if status == 401 else ""
            raise ApiError(f"{self.url}: {detail or status}{hint}")
        return answer

    def _send(self, method: str, target: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {"accept": "application/json"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"
        if body is not None:
            headers["content-type"] = "application/json"
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_seconds)
        try:
            connection.request(method, target, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerUnavailable(
                f"no kvstrata server answers at {self.url}: {reason}; is it running? (--url says where)"
            ) from None
        finally:
            connection.close()


def connect(url: str | None, token_file: str | None, timeout_seconds: float = _TIMEOUT_SECONDS) -> ApiClient:
    """The API that the options, or else the configuration, name.

    Raises:
        ConfigError: the configuration or the token file cannot be used.
    """
    settings = load_settings().settings
    if url is None:
        host = settings.http_host
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            if address.is_unspecified:
                host = "127.0.0.1" if address.version == 4 else "::1"
            host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{settings.http_port or DEFAULT_PORT}"
        token_file = token_file or settings.http_token_file
    return ApiClient(url, None if token_file is None else _read_token(token_file), timeout_seconds)


def _read_token(file: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a token"
        raise ConfigError(f"--token-file {file!r} cannot be read: {reason}") from None


def follow(
    api: ApiClient,
    job: dict[str, Any],
    *,
    no_wait: bool,
    as_json: bool,
    tell: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Wait for a job, showing how far it is on a terminal; then print it, as ``tell`` puts it.

    When the wait is interrupted (Ctrl-C) the job is cancelled.
    """
    try:
        while not no_wait and job["state"] in {"waiting", "running"}:
            if sys.stderr.isatty():
                of = "" if job["num_total"] is None else f" of {job['num_total']:,}"
                print(f"\r{job['kind']}: {job['num_done']:,}{of} ", end="", file=sys.stderr, flush=True)
            time.sleep(_POLL_SECONDS)
            job = api.ask("GET", f"/jobs/{job['id']}")
    except KeyboardInterrupt:
        api.ask("DELETE", f"/jobs/{job['id']}")
        raise
    if sys.stderr.isatty() and not no_wait:
        print("\r\x1b[K", end="", file=sys.stderr)
    if as_json:
        print_json(job)
    elif job["state"] == "failed":
        print(f"kvstrata: {job['kind']} failed: {job['error']}", file=sys.stderr)
    elif job["state"] == "done":
        print(tell(job))
    else:
        print(f"job {job['id']} ({job['kind']}) is {job['state']}")
    return job


def outcome(job: dict[str, Any]) -> int:
    """The exit status that a job's end stands for: 1 when it did not get to its end."""
    return FAULT if job["state"] in {"failed", "cancelled"} else 0
