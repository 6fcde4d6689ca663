"""Who may use the HTTP API: the token, and what follows from the address it listens on."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from kvstrata.errors import ConfigError

MIN_TOKEN_CHARS = 16
_MAX_TOKEN_BYTES = 4096
OPEN_PATHS = frozenset({"/health", "/healthcheck", "/ready"})
"""What anybody may read: probes of an orchestrator carry no token."""
READING = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class Access:
    """The rules. ``repr`` does not show the token."""

    token: bytes | None = None
    """What requests must bear; None: nothing."""
    open_reads: bool = False
    """Whether reads go without it."""
    hosts: frozenset[str] | None = None
    """Names by which the server may be addressed (without port); None: any."""
    open_paths: frozenset[str] = OPEN_PATHS
    """What anybody may read."""

    def __repr__(self) -> str:
        return (
            f"Access(token={'***' if self.token else None}, open_reads={self.open_reads}, hosts={self.hosts})"
        )

    def allows(self, method: str, path: str, authorization: bytes) -> bool:
        """Whether a request with that ``Authorization`` header may pass."""
        if self.token is None or (method in READING and (self.open_reads or path in self.open_paths)):
            return True
        scheme, _, given = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token)


def make_access(host: str, token_file: str | None, *, open_reads: bool = False) -> Access:
    """The rules for an API that listens on ``host``.

    Raises:
        ConfigError: others than this machine could reach it and there is no token; or the token cannot be used.
    """
    local = is_loopback(host)
    if token_file is None and not local:
        raise ConfigError(
            f"http_host = {host!r} can be reached from elsewhere, so the HTTP API wants a token: put one into a "
            "file (openssl rand -hex 32 > FILE; chmod 600 FILE) and set http_token_file (--http-token-file FILE)"
        )
    if open_reads and token_file is None:
        raise ConfigError("http_open_reads has no effect without http_token_file")
    token = None if token_file is None else read_token(Path(token_file))
    # On loopback the browser of this machine's user is the danger: a page elsewhere whose name resolves to here.
    hosts = frozenset({host.lower(), "localhost", "127.0.0.1", "::1"}) if local else None
    return Access(token, open_reads, hosts)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False  # listening on it fails, with a better message
    return bool(found) and all(ipaddress.ip_address(each[4][0]).is_loopback for each in found)


def read_token(path: Path) -> bytes:
    """The token in a file that is its owner's (and perhaps group's) to read only.

    Raises:
        ConfigError: there is none, others can read or change it, or it is too short.
    """
    where = f"http_token_file = {str(path)!r}"
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MAX_TOKEN_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode) or mode & 0o027:
        raise ConfigError(
            f"{where}: others can read or change it (mode {stat.S_IMODE(mode):o}); "
            "chmod 600 it, or mount the secret with defaultMode 0400"
        )
    token = text.strip()
    if not MIN_TOKEN_CHARS <= len(token) <= _MAX_TOKEN_BYTES or not token.isascii() or b" " in token:
        raise ConfigError(f"{where}: expected one line of {MIN_TOKEN_CHARS} or more printable characters")
    return token
