"""Servers as children that never outlive the process that started them.

Servers that tests, the demo and benchmarks start go through :class:`ServerProcess`: each is ended with all
its descendants on exit, on an exception, and when the starting process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstrata.testing import guard

_CAUSE = re.compile(r"(Error|Exception|error|fatal)\b.*[:=]|[Cc]annot|in use")


class ServerFailed(RuntimeError):
    """A server did not start, or ended; the message holds the end of its log.

    ``summary`` says the same in one line.
    """

    def __init__(self, message: str, summary: str = "") -> None:
        super().__init__(message)
        self.summary = summary or message


_PORTS = range(10_000, 32_768)
"""Below those that Linux gives to connections and to sockets that want any (``ip_local_port_range``): none of them
gets a port whose server is not there yet, or is being started anew."""
_given_ports: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free, and that this process was not given before."""
    while True:
        port = secrets.choice(_PORTS)
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given_ports.add(port)
        return port


class ServerProcess:
    """One server process with its log file, below a guard (:mod:`kvstrata.testing.guard`).

    A context manager; ``start`` and ``stop`` do the same by hand. Not thread-safe.

    Args:
        command: program and arguments.
        log_path: where its output goes; appended to, so that a restart keeps the first run's log.
        env: variables added to this process' environment; None as a value removes one.
        ready: asked again and again after the start until it returns True.
        start_timeout_seconds: deadline for ``ready``.
        grace_seconds: how long it may take to end by itself when stopped.
        progress: told once in a while how long the start has taken.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str | None] | None = None,
        ready: Callable[[], bool] = lambda: True,
        start_timeout_seconds: float = 30.0,
        grace_seconds: float = 5.0,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._command = list(command)
        merged: dict[str, str | None] = {**os.environ, **(env or {})}
        self._env = {key: value for key, value in merged.items() if value is not None}
        self._ready = ready
        self._start_timeout_seconds = start_timeout_seconds
        self._grace_seconds = grace_seconds
        self._progress = progress
        self._guard: subprocess.Popen[bytes] | None = None
        self._status = b""
        self.pid = 0
        """The server's own process, once started."""
        self.returncode: int | None = None
        """How it ended; None while it runs."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            ServerFailed: it ended, or was not ready in time; it has been stopped then.
        """
        if self._guard is not None:
            raise RuntimeError(f"{self.name} is running already")
        self.launch()
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start it without waiting; :meth:`wait_until_ready` is to follow."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.returncode, self.pid, self._status = None, 0, b""
        with self.log_path.open("ab") as log:
            self._guard = subprocess.Popen(  # noqa: S603  (the command is the caller's)
                [sys.executable, "-I", guard.__file__, str(self._grace_seconds), *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )
        deadline = time.monotonic() + 10
        while not self.pid and self._guard.poll() is None and time.monotonic() < deadline:
            self._read_status(0.1)

    def wait_until_ready(self) -> None:
        """Wait after :meth:`launch`.

        Raises:
            ServerFailed: as :meth:`start`.
        """
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        start = time.monotonic()
        while True:
            if not self.running:
                raise self._failed(f"{self.name} ended with status {self.returncode}")
            if self._ready():
                return
            seconds = time.monotonic() - start
            if seconds > self._start_timeout_seconds:
                raise self._failed(f"{self.name} was not ready after {seconds:.0f} s")
            if self._progress is not None:
                self._progress(seconds)
            time.sleep(0.05)

    def _failed(self, what: str) -> ServerFailed:
        lines = [line.strip() for line in self.log_tail(200).splitlines() if line.strip()]
        cause = next((line for line in reversed(lines) if _CAUSE.search(line)), "")
        summary = f"{what}{': ' if cause else ''}{cause[:300]} (log: {self.log_path})"
        return ServerFailed(f"{what}; the end of {self.log_path}:\n{self.log_tail()}", summary)

    def log_tail(self, num_lines: int = 30) -> str:
        """The last lines of its log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    @property
    def running(self) -> bool:
        """Whether the server's own process is there."""
        if self._guard is None:
            return False
        self._read_status(0)
        if self.returncode is None:
            self.returncode = self._guard.poll()
        return self.returncode is None

    def _read_status(self, timeout_seconds: float) -> None:
        """Take in what the guard has said: ``started PID``, ``ended STATUS``."""
        assert self._guard is not None
        assert self._guard.stdout is not None
        output = self._guard.stdout.fileno()
        if not select.select([output], [], [], timeout_seconds)[0]:
            return
        self._status += os.read(output, 4096)
        *lines, self._status = self._status.split(b"\n")
        for line in lines:
            word, _, number = line.partition(b" ")
            if word == b"started":
                self.pid = int(number)
            elif word == b"ended":
                self.returncode = int(number)

    def processes(self) -> list[int]:
        """All living processes that this server started, itself included."""
        if self._guard is None:
            return []
        return [pid for pid in guard.descendants(self._guard.pid) if not _is_zombie(pid)]

    def kill(self, number: int = signal.SIGKILL, *, processes: Sequence[int] | None = None) -> None:
        """Send a signal to the server's own process (by default), or to those of its ``processes``."""
        mine = self.processes()
        for pid in processes if processes is not None else [self.pid]:
            if pid in mine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait_until_ended(self, timeout_seconds: float = 10.0) -> bool:
        """Whether its own process ends within the time."""
        deadline = time.monotonic() + timeout_seconds
        while self.running and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.running

    def stop(self) -> None:
        """End it and everything it started. Idempotent; returns when nothing of it is left."""
        if self._guard is None:
            return
        guarding = self._guard
        assert guarding.stdin is not None
        assert guarding.stdout is not None
        guarding.stdin.close()
        try:
            # The guard itself ends the tree; this waits a little longer than it may take.
            guarding.wait(self._grace_seconds + 30)
        finally:
            if guarding.poll() is None:
                for pid in self.processes():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                guarding.kill()
                guarding.wait()
            guarding.stdout.close()
            if self.returncode is None:
                self.returncode = guarding.returncode
            self._guard = None


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"
