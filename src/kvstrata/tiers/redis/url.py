"""What a URL of the Redis family says: which servers there are, how they share the entries, how to log in."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers import urls
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.tls import TLS_PARAMETERS, tls_fields

Kind = Literal["single", "ring", "sentinel", "cluster"]
ReadFrom = Literal["master", "replica"]

SCHEMES: dict[str, tuple[Kind, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "valkey": ("single", False),
    "valkeys": ("single", True),
    "redis-sentinel": ("sentinel", False),
    "rediss-sentinel": ("sentinel", True),
    "valkey-sentinel": ("sentinel", False),
    "valkeys-sentinel": ("sentinel", True),
    "redis-cluster": ("cluster", False),
    "rediss-cluster": ("cluster", True),
    "valkey-cluster": ("cluster", False),
    "valkeys-cluster": ("cluster", True),
}
"""What each scheme stands for, and whether it means TLS; ``unix`` has a path in place of hosts."""

SENTINEL_PARAMETERS = ("sentinel_username", "sentinel_password", "read_from")
PARAMETERS = ("db", "username", "password", "ssl", *TLS_PARAMETERS, *SENTINEL_PARAMETERS)
DEFAULT_SERVICE = "mymaster"
_wrong = partial(urls.wrong, "redis")
_flag = partial(urls.flag, "redis")
_DEFAULT_PORTS: dict[Kind, int] = {"single": 6379, "ring": 6379, "cluster": 6379, "sentinel": 26379}


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What a URL names. ``repr`` is without secrets."""

    kind: Kind
    endpoints: tuple[Endpoint, ...]
    """The servers; for a cluster those to begin with, for ``sentinel`` the sentinels with their own login."""
    data: Endpoint
    """Login, database and TLS of the servers that hold data; its address counts where ``kind`` is ``single``."""
    service: str = DEFAULT_SERVICE
    read_from: ReadFrom = "master"

    def describe(self) -> str:
        """The URL without secrets and parameters."""
        if self.kind == "single":
            return self.data.describe()
        hosts = ",".join(endpoint.address for endpoint in self.endpoints)
        scheme = "rediss" if self.data.tls else "redis"
        match self.kind:
            case "ring":
                return f"{scheme}://{hosts}/{self.data.db}"
            case "cluster":
                return f"{scheme}-cluster://{hosts}"
            case "sentinel":
                return f"{scheme}-sentinel://{hosts}/{self.service}?db={self.data.db}"

    def __repr__(self) -> str:
        return f"Deployment({self.describe()})"


def parse_url(url: str) -> Deployment:
    """Read a URL; docs/redis.md shows all forms.

    Raises:
        ConfigError: another form. The message never has a password.
    """
    scheme = url.partition("://")[0].lower()
    if "://" not in url or (scheme not in SCHEMES and scheme != "unix"):
        allowed = ", ".join((*SCHEMES, "unix"))
        raise _wrong(f"scheme {scheme[:20]!r}; allowed are {allowed}")
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        login, _, hosts = parts.netloc.rpartition("@")
    except ValueError:
        # The parser's own message may quote a password that has a / or # in it.
        raise _unreadable(scheme) from None
    if parts.fragment or ("@" in parts.query and not query.keys() <= set(PARAMETERS)):
        # A password with a # or ? in it. What stands before that would pass for the host, and be shown.
        raise _unreadable(scheme)
    _check_names(query)
    if scheme == "unix":
        _refuse(query, ("ssl", *TLS_PARAMETERS), "needs rediss://")
        _refuse(query, SENTINEL_PARAMETERS, "needs redis-sentinel://")
        return _unix(hosts + parts.path, login, query)
    kind, tls = SCHEMES[scheme]
    addresses = [_address(host, scheme, _DEFAULT_PORTS[kind]) for host in hosts.split(",")]
    if len(set(addresses)) < len(addresses):
        raise _wrong("a server is named twice")
    if "@" in login and "," in login:
        raise _wrong("one login for all servers stands before the first; an @ in a password is written %40")
    tls = _flag(query, "ssl", {"true": True, "false": False}) if "ssl" in query else tls
    username, password = _login(login, query)
    data = Endpoint(
        host=addresses[0][0],
        port=addresses[0][1],
        db=_database(kind, query.get("db", ""), "" if kind == "sentinel" else parts.path.strip("/")),
        username=username,
        password=password,
        **(tls_fields("redis", query) if tls else _no_tls(query)),
    )
    if kind != "sentinel":
        _refuse(query, SENTINEL_PARAMETERS, "needs redis-sentinel://")
        endpoints = tuple(data.at(host, port) for host, port in addresses)
        is_ring = kind == "single" and len(endpoints) > 1
        return Deployment(kind="ring" if is_ring else kind, endpoints=endpoints, data=data)
    own = {"username": query.get("sentinel_username", ""), "password": query.get("sentinel_password", "")}
    sentinel = msgspec.structs.replace(data, db=0, **own)
    return Deployment(
        kind="sentinel",
        endpoints=tuple(sentinel.at(host, port) for host, port in addresses),
        data=data,
        service=unquote(parts.path.strip("/")) or DEFAULT_SERVICE,
        read_from=_flag(query, "read_from", {"master": "master", "replica": "replica"}),
    )


def _unreadable(scheme: str) -> ConfigError:
    return ConfigError(
        f"url of the redis tier cannot be read ({scheme}://...): a wrong port or query, or a password"
        " with characters that need percent encoding"
    )


def _check_names(query: dict[str, str]) -> None:
    for name in query:
        if name not in PARAMETERS:
            raise urls.unknown_parameter("redis", name, PARAMETERS)


def _refuse(query: dict[str, str], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name in query:
            raise _wrong(f"{name} {why}")


def _unix(path: str, login: str, query: dict[str, str]) -> Deployment:
    if not path:
        raise _wrong("unix:// needs a path, as in unix:///run/redis.sock")
    db = _database("single", query.get("db", ""), "")
    username, password = _login(login, query)
    endpoint = Endpoint(socket_path=unquote(path), db=db, username=username, password=password)
    return Deployment(kind="single", endpoints=(endpoint,), data=endpoint)


def _address(text: str, scheme: str, default_port: int) -> tuple[str, int]:
    """Host and port of ``host``, ``host:port``, ``[v6]`` or ``[v6]:port``."""
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port
    except ValueError:
        raise _unreadable(scheme) from None
    return parts.hostname or "localhost", port or default_port


def _login(text: str, query: dict[str, str]) -> tuple[str, str]:
    """User and password."""
    username, _, password = text.partition(":")
    return query.get("username") or unquote(username), query.get("password") or unquote(password)


def _database(kind: Kind, parameter: str, path: str) -> int:
    text = parameter or path
    if text and not (text.isascii() and text.isdigit()):
        raise _wrong("the database is not a number, as in redis://host:6379/0")
    if kind == "cluster" and int(text or 0):
        raise _wrong(f"a cluster has database 0 only, not {text}")
    return int(text or 0)


def _no_tls(query: dict[str, str]) -> dict[str, Any]:
    _refuse(query, TLS_PARAMETERS, "needs rediss:// (or ssl=true)")
    return {}
