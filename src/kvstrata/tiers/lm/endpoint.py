"""Where an lm server is, and how to connect to it."""

from __future__ import annotations

import difflib
import socket
import ssl
import time
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers import sockets

PARAMETERS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs")


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One server. ``repr`` is without the token."""

    host: str
    port: int
    token: str = ""
    tls: bool = False
    ca_file: str = ""
    """Certificates to trust; those of the system when empty."""
    certificate_file: str = ""
    key_file: str = ""
    check_hostname: bool = True
    verify: bool = True

    def describe(self) -> str:
        """The address without secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'lms' if self.tls else 'lm'}://{host}:{self.port}"

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
        addresses = sockets.resolve(self.host, self.port, deadline)
        return sockets.connect(addresses, deadline, context=context, server_hostname=self.host)


def parse_url(url: str) -> Endpoint:
    """Read ``lm://[:token@]host:port`` or ``lms://`` with parameters for TLS.

    Raises:
        ConfigError: another form. The message never has the token.
    """
    scheme = url.partition("://")[0]
    if scheme not in ("lm", "lms") or "://" not in url:
        raise ConfigError(f"url of the lm tier: scheme {scheme[:20]!r}; allowed are lm, lms")
    try:
        parts = urlsplit(url)
        port = parts.port
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        # The parser's own message may quote a token that has a / or # in it.
        raise ConfigError(
            f"url of the lm tier cannot be read ({scheme}://...): a wrong port or query, or a token with"
            " characters that need percent encoding"
        ) from None
    if not parts.hostname or not port or parts.path.strip("/"):
        raise ConfigError(
            "url of the lm tier: expected lm://[:token@]host:port, as in lm://cache.example:65432"
        )
    for name in query:
        if name not in PARAMETERS:
            near = difflib.get_close_matches(name, PARAMETERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"url of the lm tier: unknown parameter {name!r}{hint}")
    if query and scheme == "lm":
        raise ConfigError(f"url of the lm tier: {next(iter(query))} needs lms://")
    return Endpoint(
        host=parts.hostname,
        port=port,
        token=unquote(parts.password or parts.username or ""),
        tls=scheme == "lms",
        ca_file=query.get("ssl_ca_certs", ""),
        certificate_file=query.get("ssl_certfile", ""),
        key_file=query.get("ssl_keyfile", ""),
        check_hostname=_flag(query, "ssl_check_hostname", {"true": True, "false": False}),
        verify=_flag(query, "ssl_cert_reqs", {"required": True, "none": False}),
    )


def _flag(query: dict[str, str], name: str, values: dict[str, bool]) -> bool:
    text = query.get(name, next(iter(values))).lower()
    if text not in values:
        raise ConfigError(f"url of the lm tier: {name}={text!r}; allowed are {', '.join(values)}")
    return values[text]


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
