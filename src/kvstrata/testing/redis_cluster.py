"""A real Redis or Valkey cluster for tests and benchmarks: children on loopback that end with their parent."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Sequence
from urllib.parse import quote

from kvstrata.testing.child import ServerGroup
from kvstrata.testing.process import free_port
from kvstrata.testing.redis_server import RedisServer, done, text

NUM_SLOTS = 16384


def slot_of(name: str | bytes) -> int:
    """The slot of a Redis entry whose name has no hash tag (``{...}``)."""
    return binascii.crc_hqx(name.encode() if isinstance(name, str) else name, 0) % NUM_SLOTS


class RedisCluster(ServerGroup):
    """Nodes that share the slots evenly, each with replicas or none.

    ``nodes`` are the masters as started, then their replicas in the same order. A lost node does not stop
    the others (``cluster-require-full-coverage no``). ``config`` are lines of configuration for all nodes,
    ``node_configs`` for each; ``meet_ports`` are the ports by which nodes reach each other (those for TLS).
    ``announce`` gives, for a node's port, the one that clients are told: that of a proxy in front of it. Among
    themselves the nodes go past the proxies (``cluster-announce-port``).
    """

    def __init__(
        self,
        num_masters: int = 3,
        *,
        replicas_per_master: int = 0,
        config: Sequence[str] = (),
        node_configs: Sequence[Sequence[str]] = (),
        meet_ports: Sequence[int] = (),
        announce: Callable[[int], int] | None = None,
        binary: str | None = None,
        password: str = "",
        node_timeout_ms: int = 1000,
    ) -> None:
        self.num_masters = num_masters
        self.password = password
        lines = [
            "cluster-enabled yes",
            "cluster-require-full-coverage no",
            f"cluster-node-timeout {node_timeout_ms}",
            "repl-diskless-sync-delay 0",
            *([f'masterauth "{password}"'] if password else []),
            *config,
        ]
        self._bus_ports = [free_port() for _ in range(num_masters * (1 + replicas_per_master))]
        own = node_configs or [()] * len(self._bus_ports)
        ports = [free_port() for _ in self._bus_ports]
        self._client_ports = [announce(port) if announce else port for port in ports]
        self.nodes = [
            RedisServer(
                [*lines, f"cluster-port {bus_port}", *_announced(port, client_port), *more],
                binary=binary,
                password=password,
                port=port,
            )
            for port, client_port, bus_port, more in zip(
                ports, self._client_ports, self._bus_ports, own, strict=True
            )
        ]
        self._meet_ports = tuple(meet_ports) or tuple(ports)

    @property
    def members(self) -> Sequence[RedisServer]:
        return self.nodes

    @property
    def url(self) -> str:
        """``redis-cluster://`` with all nodes that were started, and the password if there is one."""
        login = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis-cluster://{login}" + ",".join(f"127.0.0.1:{port}" for port in self._client_ports)

    def start(self) -> None:
        """Start all nodes, share the slots, and wait until every node sees every slot served."""
        for node in self.nodes:
            node.start()
        for number, node in enumerate(self.nodes):
            done(node.ask("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1)))
            if number < self.num_masters:
                first, last = self._share(number)
                done(node.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)))
        for port, bus_port in list(zip(self._meet_ports, self._bus_ports, strict=True))[1:]:
            done(self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", str(port), str(bus_port)))
        self.wait_until(lambda: all(len(self._known(node)) == len(self.nodes) for node in self.nodes))
        masters = [text(node.ask("CLUSTER", "MYID")) for node in self.nodes[: self.num_masters]]
        for number, node in enumerate(self.nodes[self.num_masters :]):
            done(node.ask("CLUSTER", "REPLICATE", masters[number % self.num_masters]))
        self.wait_until(lambda: all(map(self._is_ready, self.nodes)))

    def _share(self, number: int) -> tuple[int, int]:
        """First and last slot of a master."""
        return number * NUM_SLOTS // self.num_masters, (number + 1) * NUM_SLOTS // self.num_masters - 1

    def _known(self, node: RedisServer) -> list[str]:
        """The nodes that ``node`` has shaken hands with, itself included."""
        lines = text(node.ask("CLUSTER", "NODES")).splitlines()
        return [line for line in lines if "handshake" not in line and "noaddr" not in line]

    def _is_ready(self, node: RedisServer) -> bool:
        info = text(node.ask("CLUSTER", "INFO"))
        if "cluster_state:ok" not in info or f"cluster_slots_ok:{NUM_SLOTS}" not in info:
            return False
        if self.nodes.index(node) < self.num_masters:
            return True
        return "master_link_status:up" in text(node.ask("INFO", "replication"))

    def owner(self, name: str | bytes) -> RedisServer:
        """The node that serves an entry now, as the first living node sees it."""
        slot = slot_of(name)
        living = next(node for node in self.nodes if node.running)
        ranges = living.ask("CLUSTER", "SLOTS")
        assert isinstance(ranges, list)
        for found in ranges:
            match found:
                case [int() as first, int() as last, [_, int() as port, *_], *_] if first <= slot <= last:
                    return next(
                        node
                        for node, *others in zip(
                            self.nodes, self._meet_ports, self._client_ports, strict=True
                        )
                        if port in (node.port, *others)
                    )
        raise RuntimeError(f"no node serves slot {slot}")

    def begin_migration(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """From now on ``source`` answers ASK for what it does not hold of ``slot``."""
        done(target.ask("CLUSTER", "SETSLOT", str(slot), "IMPORTING", text(source.ask("CLUSTER", "MYID"))))
        done(source.ask("CLUSTER", "SETSLOT", str(slot), "MIGRATING", text(target.ask("CLUSTER", "MYID"))))

    def move_entries(
        self, slot: int, source: RedisServer, target: RedisServer, count: int = NUM_SLOTS
    ) -> int:
        """Move up to ``count`` entries of ``slot``; how many were moved."""
        names = source.ask("CLUSTER", "GETKEYSINSLOT", str(slot), str(count))
        assert isinstance(names, list)
        login = ["AUTH", self.password] if self.password else []
        for name in names:
            assert isinstance(name, bytes)
            port = self._meet_ports[self.nodes.index(target)]
            done(source.ask("MIGRATE", "127.0.0.1", str(port), "", "0", "10000", *login, "KEYS", name))
        return len(names)

    def end_migration(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """``target`` serves ``slot`` from now on; all other nodes answer MOVED."""
        owner = text(target.ask("CLUSTER", "MYID"))
        others = [node for node in self.nodes[: self.num_masters] if node not in (source, target)]
        for node in (target, source, *others):
            if node.running:
                done(node.ask("CLUSTER", "SETSLOT", str(slot), "NODE", owner))

    def migrate(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Move a slot with all its entries."""
        self.begin_migration(slot, source, target)
        while self.move_entries(slot, source, target):
            pass
        self.end_migration(slot, source, target)


def _announced(port: int, client_port: int) -> list[str]:
    """Configuration of a node that clients are to reach by another port than its own."""
    return [f"cluster-announce-port {client_port}"] if client_port != port else []
