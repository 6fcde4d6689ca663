"""Running a remote server as a process: event loop, signals, warnings at the start."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
from collections.abc import Callable

from kvstrata.config import GIB
from kvstrata.remote.server import RemoteServer
from kvstrata.remote.service import RemoteOptions

log = logging.getLogger(__name__)


def run(options: RemoteOptions, on_ready: Callable[[RemoteServer], None] | None = None) -> int:
    """Serve until SIGINT or SIGTERM: ``kvstrata remote``. Returns the exit status.

    Raises:
        ConfigError: it cannot start as it is set up.
    """
    asyncio.run(_serve(options, on_ready))
    return 0


async def _serve(options: RemoteOptions, on_ready: Callable[[RemoteServer], None] | None) -> None:
    server = RemoteServer(options)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    ttl = "" if options.ttl_seconds is None else f", for up to {options.ttl_seconds} s"
    disk = "" if options.disk is None else f", and on disk in {options.disk}"
    log.info(
        "serving on %s, %.1f GiB of entries in memory%s%s", server.url, options.max_bytes / GIB, disk, ttl
    )
    if not options.token and not _is_loopback(options.host):
        log.warning(
            "%s is open to everybody who can reach it: there is no token (--token-file; clients of LMCache cannot"
            " have one, so for them bind to an address of a private network)",
            server.url,
        )
    elif options.token and options.tls_cert is None and not _is_loopback(options.host):
        log.warning("without TLS (--tls-cert) entries can be read and changed on their way")
    if on_ready is not None:
        on_ready(server)
    await server.serve()
    log.info("stopped")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
