"""Real servers in processes of their own, started in milliseconds: a host process that has imported everything
forks one for each.

As a program (``python -m kvstrata.testing.forked``) it is that host: it reads one JSON request a line from
standard input and answers each with a line. It ends with its owner, and the servers end with it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from kvstrata.config import Settings
from kvstrata.logs import configure_logging
from kvstrata.server.lifecycle import stopped_by_signals
from kvstrata.server.server import Server
from kvstrata.testing.guard import die_with_parent

_START_SECONDS = 20.0


class StartRequest(msgspec.Struct, tag=True):
    """Start a server."""

    settings: Settings
    endpoint: str
    pool_socket: str
    log_path: str
    plugin_path: str = ""


class WaitRequest(msgspec.Struct, tag=True):
    """Reap a server that is ending."""

    pid: int


class Reply(msgspec.Struct):
    pid: int
    endpoint: str = ""


class ForkedServer:
    """One server process, for the test that started it."""

    def __init__(self, host: ServerHost, pid: int, endpoint: str, log_path: Path) -> None:
        self.pid = pid
        self.endpoint = endpoint
        self.log_path = log_path
        self._host = host
        self._ended = False

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if not self._ended:
            os.kill(self.pid, number)

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it and wait until it has ended. Idempotent."""
        if not self._ended:
            self.send(number)
            self._host.wait(self.pid)
            self._ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class ServerHost:
    """The process that forks servers. A context manager; not thread-safe."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kvs-host-")
        self.directory = Path(self._directory.name)
        """Short enough for paths of sockets."""
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvstrata.testing.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(self, settings: Settings, *, endpoint: str = "", plugin_path: str = "") -> ForkedServer:
        """A server on ``endpoint`` (by default a free port of 127.0.0.1), listening.

        Raises:
            RuntimeError: it ended instead; the message has its log.
        """
        self._count += 1
        log_path = self.directory / f"{self._count}.log"
        reply = self._ask(
            StartRequest(
                settings,
                endpoint or "tcp://127.0.0.1:*",
                str(self.directory / f"{self._count}.pool"),
                str(log_path),
                plugin_path,
            )
        )
        if not reply.endpoint:
            self.wait(reply.pid)
            raise RuntimeError(f"the server did not start:\n{log_path.read_text()}")
        return ForkedServer(self, reply.pid, reply.endpoint, log_path)

    def wait(self, pid: int) -> None:
        """Wait until a server that was told to end has ended."""
        self._ask(WaitRequest(pid))

    def _ask(self, request: StartRequest | WaitRequest) -> Reply:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=Reply)

    def close(self) -> None:
        """End it, and with it every server that still runs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# The host's side


_requests = msgspec.json.Decoder(StartRequest | WaitRequest)


def _host() -> None:
    gc.freeze()
    for line in sys.stdin.buffer:
        request: StartRequest | WaitRequest = _requests.decode(line)
        if isinstance(request, StartRequest):
            reply = _fork(request)
        else:
            os.waitpid(request.pid, 0)
            reply = Reply(request.pid)
        sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
        sys.stdout.buffer.flush()


def _fork(request: StartRequest) -> Reply:
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_with_parent()
            os.close(here)
            log = os.open(request.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for fd in (1, 2):
                os.dup2(log, fd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _serve(request, there)
            status = 0
        finally:
            os._exit(status)
    os.close(there)
    with contextlib.closing(os.fdopen(here, "rb")) as pipe:
        ready, _, _ = select.select([pipe], [], [], _START_SECONDS)
        return Reply(pid, pipe.read().decode() if ready else "")


def _serve(request: StartRequest, ready: int) -> None:
    configure_logging("INFO")
    if request.plugin_path:
        sys.path.append(request.plugin_path)
    server = Server(request.settings, endpoint=request.endpoint, pool_socket=request.pool_socket)
    with contextlib.closing(server), stopped_by_signals(server):
        os.write(ready, server.endpoint.encode())
        os.close(ready)
        server.serve()


def wait_for_end(pid: int, timeout_seconds: float = 20.0) -> bool:
    """Whether a process that is not our child is gone, or a zombie, within the time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


if __name__ == "__main__":
    _host()
