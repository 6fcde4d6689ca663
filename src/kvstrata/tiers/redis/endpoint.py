"""Where a server of the Redis family is, and how to connect and log in to it."""

from __future__ import annotations

import socket
import ssl
import time

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers import sockets


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
        return f"{'rediss' if self.tls else 'redis'}://{self.address}/{self.db}"

    @property
    def address(self) -> str:
        """``host:port``, or the path of the socket."""
        if self.socket_path:
            return self.socket_path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def at(self, host: str, port: int) -> Endpoint:
        """The same login and TLS at another address."""
        return msgspec.structs.replace(self, host=host, port=port, socket_path="")

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
