"""Running a server as a process: signals, HTTP API, paths."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from kvstrata.config import Settings
from kvstrata.server.server import Server

logger = logging.getLogger(__name__)

DEFAULT_HTTP_PORT = 8080


@contextlib.contextmanager
def stopped_by_signals(server: Server) -> Iterator[None]:
    """SIGINT and SIGTERM end ``server``; the handlers that were there come back afterwards."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(settings: Settings, on_ready: Callable[[str, str | None], None] | None = None) -> int:
    """Serve until SIGINT or SIGTERM: ``kvstrata server``. Returns the exit status.

    Args:
        settings: the whole tree.
        on_ready: called once, with the endpoint for clients and the address of the HTTP API if there is one.

    Raises:
        ConfigError, PoolError: it cannot start as configured.
    """
    pool_socket = settings.runtime_directory / f"pool-{settings.port or os.getpid()}.sock"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    server = Server(settings, endpoint=f"tcp://{host}:{settings.port or '*'}", pool_socket=str(pool_socket))
    http_port = DEFAULT_HTTP_PORT if settings.http_port is None else settings.http_port
    with (
        contextlib.closing(server),
        stopped_by_signals(server),
        http_api(server, settings, http_port) as http_url,
    ):
        if on_ready is not None:
            on_ready(server.endpoint, http_url)
        server.serve()
        logger.info("stopping; queued writes are completed first")
    return 0


@contextlib.contextmanager
def http_api(
    server: Server, settings: Settings, port: int, *, or_free_port: bool = False
) -> Iterator[str | None]:
    """The HTTP API next to the server, unless its extra is not installed. ``or_free_port``: as of ``HttpServer``.

    Raises:
        ConfigError: its address or token cannot be used.
    """
    try:
        from kvstrata.http.access import make_access  # noqa: PLC0415
        from kvstrata.http.serve import HttpServer  # noqa: PLC0415  the extra "http" may be missing
    except ImportError as error:
        logger.warning("no HTTP API: %s; install it with: pip install 'kvstrata[http]'", error)
        yield None
        return
    access = make_access(settings.http_host, settings.http_token_file, open_reads=settings.http_open_reads)
    http = HttpServer(
        server,
        settings.http_host,
        port,
        server.operations,
        access,
        with_page=settings.http_dashboard,
        or_free_port=or_free_port,
    )
    http.start()
    try:
        yield http.url
    finally:
        http.stop()
