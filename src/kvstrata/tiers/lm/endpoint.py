"""Where an lm server is, and how to connect to it."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from kvstrata.errors import ConfigError
from kvstrata.tiers import sockets
from kvstrata.tiers.tls import TLS_PARAMETERS, TLSEndpoint, tls_fields
from kvstrata.tiers.urls import unknown_parameter, wrong


class Endpoint(TLSEndpoint, frozen=True, kw_only=True):
    """One server. ``repr`` is without the token."""

    host: str
    port: int
    token: str = ""

    def describe(self) -> str:
        """The address without secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'lms' if self.tls else 'lm'}://{host}:{self.port}"

    def connect(self, context: ssl.SSLContext | None, timeout_seconds: float) -> socket.socket:
        """A connected socket, its TLS handshake done.

        Raises:
            OSError: refused, unknown host, certificate not trusted, or not done in time.
        """
        deadline = time.monotonic() + timeout_seconds
        addresses = sockets.resolve(self.host, self.port, deadline)
        return sockets.connect(addresses, deadline, context=context, server_hostname=self.host)


def parse_url(url: str) -> Endpoint:
    """Read ``lm://[:token@]host:port`` or ``lms://`` with parameters for TLS.

    Raises:
        ConfigError: another form. The message never has the token.
    """
    scheme = url.partition("://")[0]
    if scheme not in ("lm", "lms") or "://" not in url:
        raise wrong("lm", f"scheme {scheme[:20]!r}; allowed are lm, lms")
    try:
        parts = urlsplit(url)
        port = parts.port
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        # The parser's own message may quote a token that has a / or # in it.
        raise _unreadable(scheme) from None
    if parts.fragment or ("@" in parts.query and not query.keys() <= set(TLS_PARAMETERS)):
        # A token with a # or ? in it. What stands before that would pass for the host, and be shown.
        raise _unreadable(scheme)
    if not parts.hostname or not port or parts.path.strip("/"):
        raise wrong("lm", "expected lm://[:token@]host:port, as in lm://cache.example:65432")
    for name in query:
        if name not in TLS_PARAMETERS:
            raise unknown_parameter("lm", name, TLS_PARAMETERS)
    if query and scheme == "lm":
        raise wrong("lm", f"{next(iter(query))} needs lms://")
    return Endpoint(
        host=parts.hostname,
        port=port,
        token=unquote(parts.password or parts.username or ""),
        **(tls_fields("lm", query) if scheme == "lms" else {}),
    )


def _unreadable(scheme: str) -> ConfigError:
    return ConfigError(
        f"url of the lm tier cannot be read ({scheme}://...): a wrong port or query, or a token with"
        " characters that need percent encoding"
    )


def read_token(path: str | Path) -> bytes:
    """The token in a file, without white space around it.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    try:
        token = Path(path).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"token file {str(path)!r} cannot be read: {error.strerror or error}") from None
    if not token:
        raise ConfigError(f"token file {str(path)!r} is empty")
    return token
