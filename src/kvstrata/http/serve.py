"""Serving the HTTP API from a thread."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time

import uvicorn

from kvstrata.errors import ConfigError
from kvstrata.http.access import Access
from kvstrata.http.app import StatusSource, create_app
from kvstrata.operations import Operations

_log = logging.getLogger(__name__)

_START_SECONDS = 10.0
_STOP_SECONDS = 2
_POLL_SECONDS = 0.005


class HttpServer:
    """The HTTP API of ``source`` on one address. ``start`` and ``stop`` are called from one thread.

    The thread is no daemon: whoever starts it has to stop it.
    """

    def __init__(
        self,
        source: StatusSource,
        host: str = "127.0.0.1",
        port: int = 8080,
        operations: Operations | None = None,
        access: Access | None = None,
        *,
        with_page: bool = False,
        or_free_port: bool = False,
    ) -> None:
        """Nothing is opened yet. Port 0 takes a free one; for the rest see ``create_app``.

        ``or_free_port``: take a free port, too, where that one is in use.
        """
        self.host = host
        self._or_free_port = or_free_port
        self.port = port
        """The port that is listened on, once started."""
        config = uvicorn.Config(
            create_app(source, operations, access, with_page=with_page),
            loop="asyncio",
            http="h11",  # bounds the size of a request's head
            server_header=False,
            ws="none",
            lifespan="off",
            log_config=None,  # logging is the process's to configure, not a library's
            log_level=logging.WARNING,
            access_log=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen, and return when requests are answered.

        Raises:
            ConfigError: the address cannot be listened on; the message says why.
        """
        listener = self._listen()
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, args=(listener,), name="kvstrata-http")
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if not self._server.started:
            self.stop()
            raise ConfigError(f"the HTTP API on {self.host}:{self.port} did not start; see the log")
        _log.info("HTTP API on %s", self.url)

    @property
    def url(self) -> str:
        """The address, once started."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def stop(self) -> None:
        """Let requests in progress end, within seconds, then the thread. Idempotent."""
        if self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join()
        self._thread = None

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.closing(listener):
            self._server.run(sockets=[listener])

    def _listen(self) -> socket.socket:
        try:
            return self._listen_at(self.port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not self._or_free_port:
                raise ConfigError(
                    f"cannot serve HTTP on {self.host}:{self.port}: {error.strerror}; "
                    "choose another http_port (--http-port)"
                ) from error
        _log.warning(
            "http_port %d is in use, perhaps by the server of another engine; the HTTP API takes a free one",
            self.port,
        )
        return self._listen_at(0)

    def _listen_at(self, port: int) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except (OSError, OverflowError) as error:
            raise ConfigError(f"http_host {self.host!r}: {error}") from error
        listener = socket.socket(family, kind, protocol)
        try:
            # A restart must not wait for the connections of the one before.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()  # until then another process can be bound to the same port
        except OSError:
            listener.close()
            raise
        return listener
