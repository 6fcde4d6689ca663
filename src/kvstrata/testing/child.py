"""Servers that tests start as direct children: they can be killed and suspended, and end with their parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from kvstrata.testing import guard

_LOG_END = 4000


class Startable(ABC):
    """Something that a ``with`` statement starts, and closes whatever happens. Not thread-safe."""

    @abstractmethod
    def start(self) -> None:
        """Start, and wait until it can be used.

        Raises:
            RuntimeError: it cannot be started; the message has what it printed.
        """

    @abstractmethod
    def close(self) -> None:
        """End it and delete what it left. Idempotent."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ChildServer(Startable):
    """One server program with a directory of its own. After ``kill``, ``start`` starts it anew."""

    START_SECONDS: ClassVar[float] = 30.0

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvs-server-"))
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it can be used."""

    def _launch(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start the program in its directory, and wait until it answers.

        Raises:
            RuntimeError: it ended, or does not answer in time.
        """
        parent = os.getpid()

        def end_with_parent() -> None:
            guard.die_with_parent()
            if os.getppid() != parent:
                os._exit(1)

        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a program of the system or of a package
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=env,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - nothing else tells a child of its parent's end
            )
        deadline = time.monotonic() + self.START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.log[-_LOG_END:]}")
            time.sleep(0.02)

    @property
    def log(self) -> str:
        """What the server printed."""
        return (self._directory / "log").read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether its process is there (a suspended one is)."""
        return self._process is not None

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def suspend(self) -> None:
        """SIGSTOP: the system still accepts connections, nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server is not running"
        self._process.send_signal(number)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


class ServerGroup(Startable):
    """Servers that make one service together."""

    READY_SECONDS: ClassVar[float] = 30.0

    @property
    @abstractmethod
    def members(self) -> Sequence[ChildServer]:
        """All of them."""

    def wait_until(self, reached: Callable[[], bool], timeout_seconds: float | None = None) -> None:
        """Wait for a state of the group, by default ``READY_SECONDS``.

        Raises:
            RuntimeError: it is not reached in time; the message has what the members printed.
        """
        deadline = time.monotonic() + (timeout_seconds or self.READY_SECONDS)
        while not reached():
            if time.monotonic() > deadline:
                logs = "\n".join(member.log[-_LOG_END:] for member in self.members)
                raise RuntimeError(f"the servers did not get ready:\n{logs}")
            time.sleep(0.02)

    def close(self) -> None:
        for member in self.members:
            member.close()
