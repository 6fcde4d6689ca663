"""The private server of embedded mode: ``python -m kvstrata.server.embedded DIRECTORY PARENT_PID``.

Reads its settings as JSON from standard input (they may hold passwords, so they are no arguments), listens on
``DIRECTORY/control.sock``, and ends with the process that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from kvstrata.client.embedded import FAILURE_FILE
from kvstrata.config import Settings
from kvstrata.errors import KVStrataError
from kvstrata.logs import configure_logging
from kvstrata.server.lifecycle import http_api, stopped_by_signals
from kvstrata.server.server import Server

logger = logging.getLogger(__name__)

CANNOT_START = os.EX_CONFIG
"""The exit status after an error that a new attempt would only repeat."""


def main(directory: Path, parent_pid: int) -> int:
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    configure_logging(settings.log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _serve(settings, directory, parent_pid)
    except KVStrataError as error:
        logger.error("the embedded server cannot start, there will be no cache: %s", error)
        staged = directory / f"{FAILURE_FILE}.staged"
        staged.write_text(str(error))
        staged.replace(directory / FAILURE_FILE)
        return CANNOT_START
    return 0


def _serve(settings: Settings, directory: Path, parent_pid: int) -> None:
    server = Server(
        settings,
        endpoint=f"ipc://{directory}/control.sock",
        pool_socket=str(directory / "pool.sock"),
        announce_chunk_size=False,
        watch_pid=parent_pid,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(server))
        stack.enter_context(stopped_by_signals(server))
        # Ctrl-C reaches the whole process group; the engine decides when this server ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if settings.http_port is not None:
            # Engines of one host often have one environment: who comes second is not to lack a cache for that.
            stack.enter_context(http_api(server, settings, settings.http_port, or_free_port=True))
        server.serve()


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
