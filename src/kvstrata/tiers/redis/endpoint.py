"""Where a server of the Redis family is, and how to connect and log in to it."""

from __future__ import annotations

import socket
import ssl
import time

import msgspec

from kvstrata.tiers import sockets
from kvstrata.tiers.tls import TLSEndpoint


class Endpoint(TLSEndpoint, frozen=True, kw_only=True):
    """One plain server. ``repr`` would show the password: use :meth:`describe`."""

    host: str = ""
    port: int = 6379
    socket_path: str = ""
    """Path of a unix socket; host and port are not used then."""
    username: str = ""
    password: str = ""
    db: int = 0

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
