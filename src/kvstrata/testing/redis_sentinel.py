"""A real Redis or Valkey under Sentinel for tests: children on loopback that end with their parent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import quote

from kvstrata.testing.child import ServerGroup
from kvstrata.testing.process import free_port
from kvstrata.testing.redis_server import RedisServer, done, text
from kvstrata.tiers.redis.resp import Reply


class RedisSentinel(ServerGroup):
    """A master, a replica of it, and three sentinels.

    ``config`` are lines of configuration for the two servers; ``sentinel_password`` is that of the
    sentinels themselves. ``announce`` gives, for a port of a server or a sentinel, the one by which it is reached:
    that of a proxy in front of it. Sentinels know nothing but what clients are told, so they watch the servers
    through the proxies, and the replica follows its master through one; each other they reach past them.
    """

    def __init__(
        self,
        config: Sequence[str] = (),
        *,
        service: str = "mymaster",
        password: str = "",
        sentinel_password: str = "",
        binary: str | None = None,
        down_after_ms: int = 1000,
        announce: Callable[[int], int] | None = None,
    ) -> None:
        self.service = service
        self.password = password
        self.sentinel_password = sentinel_password
        lines = ["repl-diskless-sync-delay 0", *([f'masterauth "{password}"'] if password else []), *config]
        ports = [free_port() for _ in range(5)]
        self._client_ports = {port: announce(port) if announce else port for port in ports}
        follow: tuple[list[str], list[str]] = ([], [f"replicaof 127.0.0.1 {self._client_ports[ports[0]]}"])
        self.servers = [
            RedisServer(
                [*lines, *more, f"replica-announce-port {self._client_ports[port]}"],
                binary=binary,
                password=password,
                port=port,
            )
            for port, more in zip(ports[:2], follow, strict=True)
        ]
        watch = [
            f"sentinel monitor {service} 127.0.0.1 {self._client_ports[ports[0]]} 2",
            f"sentinel down-after-milliseconds {service} {down_after_ms}",
            f"sentinel failover-timeout {service} 5000",
            *([f'sentinel auth-pass {service} "{password}"'] if password else []),
            *([f'sentinel sentinel-pass "{sentinel_password}"'] if sentinel_password else []),
        ]
        self.sentinels = [
            RedisServer(watch, binary=binary, password=sentinel_password, arguments=["--sentinel"], port=port)
            for port in ports[2:]
        ]

    @property
    def members(self) -> Sequence[RedisServer]:
        return (*self.sentinels, *self.servers)

    @property
    def url(self) -> str:
        """``redis-sentinel://`` with the service's name, and with the passwords if there are any."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        hosts = ",".join(f"127.0.0.1:{self._client_ports[sentinel.port]}" for sentinel in self.sentinels)
        own = f"?sentinel_password={quote(self.sentinel_password, safe='')}" if self.sentinel_password else ""
        return f"redis-sentinel://{login}{hosts}/{self.service}{own}"

    @property
    def master(self) -> RedisServer:
        """The master as the sentinels see it."""
        return self._by_port(self._master_port(self._asked()))

    @property
    def replica(self) -> RedisServer:
        """The other one."""
        master = self.master
        return next(server for server in self.servers if server is not master)

    def start(self) -> None:
        """Start all, and wait until the replica is in sync and the sentinels know it and each other."""
        for server in (*self.servers, *self.sentinels):
            server.start()
        self.wait_until(self.is_settled)

    def is_settled(self) -> bool:
        """Whether all sentinels name the same living master, know each other and a replica that is in sync."""
        living = [sentinel for sentinel in self.sentinels if sentinel.running]
        ports = {self._master_port(sentinel) for sentinel in living}
        if len(ports) != 1:
            return False
        master = self._by_port(ports.pop())
        replicas = [server for server in self.servers if server is not master and server.running]
        linked = all(
            "master_link_status:up" in text(server.ask("INFO", "replication")) for server in replicas
        )
        return linked and all(
            _field(sentinel.ask("SENTINEL", "MASTER", self.service), b"num-other-sentinels") == b"2"
            and _field(sentinel.ask("SENTINEL", "MASTER", self.service), b"flags") == b"master"
            and self._sees_replicas(sentinel)
            for sentinel in living
        )

    def _sees_replicas(self, sentinel: RedisServer) -> bool:
        replicas = sentinel.ask("SENTINEL", "REPLICAS", self.service)
        assert isinstance(replicas, list)
        return len(replicas) == 1 and _field(replicas[0], b"master-link-status") == b"ok"

    def failover(self) -> None:
        """Order a failover, and wait until all sentinels name the new master."""
        old = self.master
        done(self._asked().ask("SENTINEL", "FAILOVER", self.service))
        self.wait_for_other_master(old)

    def wait_for_other_master(self, old: RedisServer) -> None:
        """Wait until all living sentinels name another master than ``old``."""
        living = [sentinel for sentinel in self.sentinels if sentinel.running]
        self.wait_until(lambda: all(self._by_port(self._master_port(s)) is not old for s in living))

    def _asked(self) -> RedisServer:
        return next(sentinel for sentinel in self.sentinels if sentinel.running)

    def _master_port(self, sentinel: RedisServer) -> int:
        match sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service):
            case [_, bytes() as port]:
                return int(port)
            case reply:
                raise RuntimeError(f"a sentinel does not know {self.service}: {reply!r}")

    def _by_port(self, port: int) -> RedisServer:
        return next(server for server in self.servers if self._client_ports[server.port] == port)


def _field(reply: Reply, name: bytes) -> Reply:
    """A field of a list of names and values, alternating."""
    if not isinstance(reply, list) or name not in reply:
        return None
    return reply[reply.index(name) + 1]
