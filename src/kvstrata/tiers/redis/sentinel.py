"""A master that Sentinel watches, and its replicas. The sentinels say which is which; it changes with a failover.

How a client is to behave: https://redis.io/docs/latest/develop/reference/sentinel-clients/
"""

from __future__ import annotations

import logging
import random
import ssl
import threading
import time
from collections.abc import Sequence

import msgspec

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.login import log_in
from kvstrata.tiers.redis.resp import ErrorReply, Reply, command
from kvstrata.tiers.redis.server import Limits, Server
from kvstrata.tiers.redis.topology import Again, Ask, Route, Topology
from kvstrata.tiers.redis.url import Deployment
from kvstrata.tiers.sockets import fair_share

log = logging.getLogger(__name__)

ASK_AGAIN_SECONDS = 0.5
"""After the sentinels gave no master, calls fail for so long without asking them."""
_NOT_SERVING = (b"s_down", b"o_down", b"disconnected")

Address = tuple[str, int]


class Found(msgspec.Struct, frozen=True):
    """What a sentinel said."""

    master: Address
    replicas: tuple[Address, ...]
    num_replicas: int
    """Those that do not serve included."""


class _Current(msgspec.Struct, frozen=True):
    master: Server
    replica: Server | None


class SentinelTopology(Topology):
    """Everything is on the master. Reads go to one of its replicas where that is asked for and one serves."""

    def __init__(self, deployment: Deployment, limits: Limits, context: ssl.SSLContext | None) -> None:
        super().__init__(limits)
        self._deployment = deployment
        self._context = context
        self._sentinels = list(deployment.endpoints)
        self._lock = threading.Lock()
        """For the fields below; never held while waiting for anybody."""
        self._asking = threading.Lock()
        """Held by who asks the sentinels, for all."""
        self._current: _Current | None = None
        self._servers: dict[tuple[Address, str], Server] = {}
        self._failure = ""
        self._ask_at = 0.0
        self._closed = False

    def route(self, names: Sequence[bytes], *, is_write: bool) -> list[Route]:
        current = self._now()
        replica = None if is_write else current.replica
        server = replica if replica is not None and replica.outage.is_over() else current.master
        return [Route(server, range(len(names)))]

    def servers(self) -> list[Server]:
        return [self._now().master]

    def lost(self, server: Server, reason: str) -> bool:
        """Without the replica the master is asked; without the master, the sentinels are."""
        with self._lock:
            current = self._current
            if current is not None and server is current.replica:
                server.outage.begin(reason)
                return True
            if current is not None and server is current.master:
                self._current = None
        server.drop_idle()
        return True

    def refused(self, server: Server, reply: ErrorReply) -> Again | Ask | None:
        """A master that became a replica answers READONLY to writes."""
        if reply.code == "READONLY" and self.lost(server, reply.text):
            return Again()
        return None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            servers = list(self._servers.values())
        for server in servers:
            server.close()

    def _now(self) -> _Current:
        """The servers as far as known; the sentinels are asked when they are not."""
        with self._lock:
            if self._current is not None:
                return self._current
        patience = self.limits.connect_timeout_seconds
        if not self._asking.acquire(timeout=patience):
            raise TierUnavailable(f"{self._deployment.describe()}: the sentinels are being asked")
        try:
            with self._lock:
                if self._current is not None:
                    return self._current
                if time.monotonic() < self._ask_at:
                    raise TierUnavailable(self._failure)
            return self._adopt(self._ask_sentinels(patience))
        finally:
            self._asking.release()

    def _ask_sentinels(self, timeout_seconds: float) -> Found:
        """What the first that answers says; it is asked first the next time."""
        deadline = time.monotonic() + timeout_seconds
        failures: list[str] = []
        for number, sentinel in enumerate(list(self._sentinels)):
            share = fair_share(deadline, len(self._sentinels) - number)
            try:
                found = ask_sentinel(sentinel, self._context, self._deployment.service, share)
            except TierUnavailable as error:
                failures.append(str(error))
                continue
            self._sentinels.remove(sentinel)
            self._sentinels.insert(0, sentinel)
            return found
        self._failure = f"{self._deployment.describe()}: no sentinel names a master: {'; '.join(failures)}"
        self._ask_at = time.monotonic() + ASK_AGAIN_SECONDS
        raise TierUnavailable(self._failure)

    def _adopt(self, found: Found) -> _Current:
        """Use what was found; connections to servers that are none of it any more are closed."""
        reads_elsewhere = self._deployment.read_from == "replica" and found.replicas
        # Each process takes one of them, and keeps it: replicas share the readers, not each reader's prompts.
        chosen = random.choice(found.replicas) if reads_elsewhere else None  # noqa: S311  no secret
        with self._lock:
            before = dict(self._servers)
            self._servers = {}
            master = self._server(before, found.master, "master")
            replica = self._server(before, chosen, "slave") if chosen else None
            is_new = (found.master, "master") not in before
            self._current = current = _Current(master, replica)
            dropped = [server for address, server in before.items() if address not in self._servers]
        for server in dropped:
            server.close()
        if is_new:
            log.info(
                "%s: the master is %s, with %d replicas; %d sentinels are configured; reads go to %s",
                self._deployment.describe(),
                master.name,
                found.num_replicas,
                len(self._sentinels),
                replica.name if replica else "the master",
            )
        return current

    def _server(self, before: dict[tuple[Address, str], Server], address: Address, role: str) -> Server:
        server = before.get((address, role))
        if server is None:
            endpoint = self._deployment.data.at(*address)
            server = Server(endpoint, self.limits, self._context, role=role)
            if self._closed:
                server.close()
        self._servers[address, role] = server
        return server


def ask_sentinel(
    sentinel: Endpoint, context: ssl.SSLContext | None, service: str, timeout_seconds: float
) -> Found:
    """The master of ``service`` and its replicas that serve.

    Raises:
        TierUnavailable: this sentinel cannot be reached, or does not know the service.
    """
    deadline = time.monotonic() + timeout_seconds
    connection = log_in(sentinel, context, timeout_seconds)
    try:
        connection.start(deadline - time.monotonic())
        name = service.encode()
        connection.send(
            [
                command(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name),
                command(b"SENTINEL", b"SLAVES", name),  # known to all versions, also those that say REPLICAS
            ]
        )
        master, replicas = connection.reply(), connection.reply()
    finally:
        connection.close()
    found = _address(master, 0, 1) if isinstance(master, list) and len(master) == 2 else None
    if found is None:
        what = master.text if isinstance(master, ErrorReply) else f"it knows no service {service!r}"
        raise TierUnavailable(f"{sentinel.describe()}: {what}")
    listed = replicas if isinstance(replicas, list) else []
    serving = [address for address in map(_replica, listed) if address is not None]
    return Found(found, tuple(sorted(serving)), len(listed))


def _address(words: Sequence[Reply], host_at: int, port_at: int) -> Address | None:
    host, port = words[host_at], words[port_at]
    if not (isinstance(host, bytes) and isinstance(port, bytes) and host):
        return None
    if not (port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        return None
    return host.decode("utf-8", "replace"), int(port)


def _replica(reply: Reply) -> Address | None:
    """The address in a list of fields and values, alternating, of a replica that is up and in sync."""
    if not isinstance(reply, list):
        return None
    fields: dict[Reply, Reply] = {
        name: value for name, value in zip(reply[::2], reply[1::2], strict=False) if isinstance(name, bytes)
    }
    flags = fields.get(b"flags")
    if not isinstance(flags, bytes) or any(flag in flags.split(b",") for flag in _NOT_SERVING):
        return None
    if fields.get(b"master-link-status") != b"ok":
        return None
    return _address([fields.get(b"ip"), fields.get(b"port")], 0, 1)
