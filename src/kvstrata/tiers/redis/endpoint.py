"""Where a server of the Redis family is, and how to connect and log in to it."""

from __future__ import annotations

import difflib
import socket
import ssl
import time
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers import sockets

TLS_PARAMETERS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs")
PARAMETERS = ("db", "username", "password", *TLS_PARAMETERS)


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One plain server. ``repr`` would show the password: use :meth:`describe`."""

    host: str = ""
    port: int = 6379
    socket_path: str = ""
    """Path of a unix socket; host and port are not used then."""
    username: str = ""
    password: str = ""
    db: int = 0
    tls: bool = False
    ca_file: str = ""
    """Certificates to trust; those of the system when empty."""
    certificate_file: str = ""
    key_file: str = ""
    check_hostname: bool = True
    verify: bool = True

    def describe(self) -> str:
        """The address without secrets."""
        if self.socket_path:
            return f"unix://{self.socket_path}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"

    def __repr__(self) -> str:
        return f"Endpoint({self.describe()})"

    def tls_context(self) -> ssl.SSLContext | None:
        """The settings of TLS connections; None for plain ones.

        Raises:
            ConfigError: a certificate file cannot be used.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None)
            if self.certificate_file:
                context.load_cert_chain(self.certificate_file, self.key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"TLS files of {self.describe()} cannot be used: {error}") from error
        context.check_hostname = self.check_hostname and self.verify
        if not self.verify:
            context.verify_mode = ssl.CERT_NONE
        return context

    def connect(self, context: ssl.SSLContext | None, timeout_seconds: float) -> socket.socket:
        """A connected socket, its TLS handshake done.

        Raises:
            OSError: refused, unknown host, certificate not trusted, or not done in time.
        """
        deadline = time.monotonic() + timeout_seconds
        if self.socket_path:
            return sockets.connect([(socket.AF_UNIX, self.socket_path)], deadline)
        addresses = sockets.resolve(self.host, self.port, deadline)
        return sockets.connect(addresses, deadline, context=context, server_hostname=self.host)


def parse_url(url: str) -> Endpoint:
    """Read ``redis://[user:password@]host[:port][/db]``, ``rediss://`` or ``unix://[user:password@]path``.

    Raises:
        ConfigError: another form. The message never has the password.
    """
    scheme = url.partition("://")[0]
    if scheme not in ("redis", "rediss", "unix") or "://" not in url:
        raise ConfigError(f"url of the redis tier: scheme {scheme[:20]!r}; allowed are redis, rediss, unix")
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        # The parser's own message may quote a password that has a / or # in it.
        raise ConfigError(
            f"url of the redis tier cannot be read ({scheme}://...): a wrong port or query, or a password"
            " with characters that need percent encoding"
        ) from None
    for name in query:
        if name not in PARAMETERS:
            near = difflib.get_close_matches(name, PARAMETERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"url of the redis tier: unknown parameter {name!r}{hint}")
    username = query.get("username") or unquote(parts.username or "")
    password = query.get("password") or unquote(parts.password or "")
    if scheme == "unix":
        path = (parts.hostname or "") + parts.path
        if not path:
            raise ConfigError("url of the redis tier: unix:// needs a path, as in unix:///run/redis.sock")
        return Endpoint(
            socket_path=unquote(path), db=_db(query.get("db", "")), username=username, password=password
        )
    path_db = parts.path.strip("/")
    return Endpoint(
        host=parts.hostname or "localhost",
        port=port,
        db=_db(query.get("db", "") or path_db),
        username=username,
        password=password,
        **(_tls(query) if scheme == "rediss" else _no_tls(query)),
    )


def _db(text: str) -> int:
    if text and not (text.isascii() and text.isdigit()):
        raise ConfigError("url of the redis tier: the database is not a number, as in redis://host:6379/0")
    return int(text or 0)


def _tls(query: dict[str, str]) -> dict[str, Any]:
    return {
        "tls": True,
        "ca_file": query.get("ssl_ca_certs", ""),
        "certificate_file": query.get("ssl_certfile", ""),
        "key_file": query.get("ssl_keyfile", ""),
        "check_hostname": _flag(query, "ssl_check_hostname", {"true": True, "false": False}),
        "verify": _flag(query, "ssl_cert_reqs", {"required": True, "none": False}),
    }


def _no_tls(query: dict[str, str]) -> dict[str, Any]:
    wrong = [name for name in query if name in TLS_PARAMETERS]
    if wrong:
        raise ConfigError(f"url of the redis tier: {wrong[0]} needs rediss://")
    return {}


def _flag(query: dict[str, str], name: str, values: dict[str, bool]) -> bool:
    text = query.get(name, next(iter(values))).lower()
    if text not in values:
        raise ConfigError(f"url of the redis tier: {name}={text!r}; allowed are {', '.join(values)}")
    return values[text]
