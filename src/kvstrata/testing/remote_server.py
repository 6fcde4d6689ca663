"""A remote server (``kvstrata remote``) on a thread of this process, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Self

import msgspec

from kvstrata.remote.server import RemoteServer
from kvstrata.remote.service import RemoteOptions, Service

START_SECONDS = 20.0


class RemoteServerThread:
    """A server on 127.0.0.1 with a port of its own. A context manager; ``stop`` and ``start`` restart it there.

    ``options`` are those of :class:`RemoteOptions`; 256 MiB of memory if nothing is said.
    """

    def __init__(self, **options: Any) -> None:
        self.options = msgspec.convert(
            {"max_bytes": 256 << 20, "host": "127.0.0.1", "port": 0} | options, RemoteOptions
        )
        self._server: RemoteServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def port(self) -> int:
        return self.options.port

    @property
    def url(self) -> str:
        """``lm://`` or ``lms://`` with the token, if there is one."""
        scheme = "lms" if self.options.tls_cert else "lm"
        login = f":{self.options.token.decode()}@" if self.options.token else ""
        return f"{scheme}://{login}127.0.0.1:{self.port}"

    @property
    def service(self) -> Service:
        """What runs on the thread, to look at."""
        assert self._server is not None, "the server is not running"
        return self._server.service

    def start(self) -> None:
        """Start and wait until it listens.

        Raises:
            ConfigError: it cannot start so.
        """
        ready = threading.Event()
        self._failure = None
        self._thread = threading.Thread(target=self._run, args=(ready,), name="remote-server", daemon=True)
        self._thread.start()
        assert ready.wait(START_SECONDS), "the remote server did not start"
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def _run(self, ready: threading.Event) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._server = RemoteServer(self.options)
            self.options = msgspec.structs.replace(self.options, port=self._server.port)
            ready.set()
            await self._server.serve()

        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001 - raised on the thread of the test
            self._failure = error
            ready.set()

    def stop(self) -> None:
        """Drain it, and wait for its end. Raises what ended it otherwise."""
        if self._thread is None:
            return
        if self._server is not None and self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._server.stop)
        self._thread.join()
        self._thread = self._server = self._loop = None
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
