"""Redis Cluster: every slot has one master, and any node says which.

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Sequence

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.login import log_in, masked
from kvstrata.tiers.redis.resp import ErrorReply, Reply, command
from kvstrata.tiers.redis.server import Limits, Server
from kvstrata.tiers.redis.slots import NUM_SLOTS, route_by_slot
from kvstrata.tiers.redis.topology import Again, Ask, Route, Topology
from kvstrata.tiers.redis.url import Deployment
from kvstrata.tiers.sockets import fair_share

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
"""From one question for the shares to the next, whatever happens in between."""
MAX_NODES = 1000

Address = tuple[str, int]
Ranges = list[tuple[int, int, Address]]
"""First slot, last slot, master."""


class ClusterTopology(Topology):
    """The slots of a cluster's masters.

    The first call asks a node for all shares. Later a call that meets MOVED, a lost node or a slot that nobody
    serves has them asked for anew in a thread that ends with it, at most once a second: no call waits for that.
    """

    def __init__(self, deployment: Deployment, limits: Limits, context: ssl.SSLContext | None) -> None:
        super().__init__(limits)
        self._deployment = deployment
        self._context = context
        self._lock = threading.Lock()
        """For the fields below; never held while waiting for anybody."""
        self._discovering = threading.Lock()
        """Held by who asks for the shares."""
        self._nodes: dict[Address, Server] = {}
        self._table: list[Server | None] = []
        self._refresh_at = 0.0
        self._failure = ""
        self._closed = False

    def route(self, names: Sequence[bytes], *, is_write: bool) -> list[Route]:  # noqa: ARG002
        routes = route_by_slot(names, self._slots())
        if any(route.server is None for route in routes):
            self._refresh_soon()
        return routes

    def servers(self) -> list[Server]:
        return sorted({server for server in self._slots() if server is not None}, key=lambda node: node.name)

    def lost(self, server: Server, reason: str) -> bool:
        if "Hash slot not served" not in reason:  # that is no fault of the node that says it
            server.outage.begin(reason)
        self._refresh_soon()
        return False

    def refused(self, server: Server, reply: ErrorReply) -> Again | Ask | None:
        """Follow MOVED and ASK."""
        if reply.code not in ("MOVED", "ASK"):
            return None
        try:
            _, slot_text, address = reply.text.split()
            host, _, port = address.rpartition(":")
            slot, target = int(slot_text), (host.strip("[]") or server.endpoint.host, int(port))
        except ValueError:
            return None
        if not (0 <= slot < NUM_SLOTS and 0 < target[1] < 65536):
            return None
        with self._lock:
            if target not in self._nodes and len(self._nodes) >= MAX_NODES:
                return None
            node = self._node(target)
            if reply.code == "ASK":
                return Ask(node)
            self._table[slot] = node
        self._refresh_soon()
        return Again()

    @property
    def is_partly_up(self) -> bool:
        with self._lock:
            table = self._table
        return any(not server.outage.reason for server in set(table) if server is not None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    # -- the shares

    def _slots(self) -> list[Server | None]:
        """The server of every slot; asked for when nothing is known yet."""
        with self._lock:
            if self._table:
                return self._table
        if not self._discovering.acquire(timeout=self.limits.connect_timeout_seconds):
            raise TierUnavailable(
                f"{self._deployment.describe()}: its nodes are being asked for their shares"
            )
        try:
            with self._lock:
                if self._table:
                    return self._table
                if time.monotonic() < self._refresh_at:
                    raise TierUnavailable(self._failure)
            self._refresh()
            return self._table
        finally:
            self._discovering.release()

    def _refresh_soon(self) -> None:
        with self._lock:
            if self._closed or time.monotonic() < self._refresh_at:
                return
            if not self._discovering.acquire(blocking=False):
                return
            self._refresh_at = time.monotonic() + REFRESH_SECONDS
        try:
            threading.Thread(target=self._refresh_now, name="kvstrata-redis-cluster", daemon=True).start()
        except RuntimeError:  # no thread can be had now
            self._discovering.release()

    def _refresh_now(self) -> None:
        try:
            self._refresh()
        except TierUnavailable as error:
            log.debug("%s", error)  # the table stays as it is; the nodes' outages are in the log
        finally:
            self._discovering.release()

    def _refresh(self) -> None:
        """Ask the nodes one after the other, within the deadline for connecting, and use the first answer."""
        deadline = time.monotonic() + self.limits.connect_timeout_seconds
        candidates = self._candidates()
        failures: list[str] = []
        for number, endpoint in enumerate(candidates):
            share = fair_share(deadline, len(candidates) - number)
            try:
                ranges = ask_shares(endpoint, self._context, share)
            except TierUnavailable as error:
                failures.append(str(error))
                continue
            self._adopt(ranges)
            return
        self._failure = f"{self._deployment.describe()}: no node tells the shares: {'; '.join(failures)}"
        self._refresh_at = time.monotonic() + REFRESH_SECONDS
        raise TierUnavailable(self._failure)

    def _candidates(self) -> list[Endpoint]:
        """Whom to ask: nodes that are up, then those of the URL, then the rest."""
        with self._lock:
            nodes = list(self._nodes.values())
        up = [node.endpoint for node in nodes if not node.outage.reason]
        down = [node.endpoint for node in nodes if node.outage.reason]
        return list(dict.fromkeys([*up[:3], *self._deployment.endpoints, *up[3:], *down]))[:16]

    def _adopt(self, ranges: Ranges) -> None:
        with self._lock:
            is_first = not self._table
            table: list[Server | None] = [None] * NUM_SLOTS
            for first, last, address in ranges:
                table[first : last + 1] = [self._node(address)] * (last + 1 - first)
            self._table = table
            serving = {server for server in table if server is not None}
            left = [address for address, node in self._nodes.items() if node not in serving]
            dropped = [self._nodes.pop(address) for address in left]
        for node in dropped:
            node.close()
        unserved = table.count(None)
        if is_first:
            log.info(
                "%s: a cluster of %d masters (%s)%s",
                self._deployment.describe(),
                len(serving),
                ", ".join(sorted(node.endpoint.address for node in serving)),
                f"; nobody serves {unserved} of {NUM_SLOTS} slots" if unserved else "",
            )

    def _node(self, address: Address) -> Server:
        """The server at an address. Called with the lock held."""
        node = self._nodes.get(address)
        if node is None:
            node = Server(self._deployment.data.at(*address), self.limits, self._context)
            self._nodes[address] = node
            if self._closed:
                node.close()
        return node


def ask_shares(endpoint: Endpoint, context: ssl.SSLContext | None, timeout_seconds: float) -> Ranges:
    """What a node says of the slots' masters, with CLUSTER SLOTS: all versions know it, and over TLS it gives the
    TLS ports.

    Raises:
        TierUnavailable: this node cannot be reached, is no cluster node, or knows no shares.
    """
    deadline = time.monotonic() + timeout_seconds
    connection = log_in(endpoint, context, timeout_seconds)
    try:
        connection.start(deadline - time.monotonic())
        connection.send([command(b"CLUSTER", b"SLOTS")])
        reply = connection.reply()
    finally:
        connection.close()
    if isinstance(reply, ErrorReply):
        raise TierUnavailable(f"{endpoint.describe()}: {masked(endpoint, reply.text)}")
    listed = reply if isinstance(reply, list) else []
    ranges = [found for found in (_range(item, endpoint.host) for item in listed) if found is not None]
    if not ranges:
        raise TierUnavailable(f"{endpoint.describe()}: the node knows of no slot that is served")
    return ranges


def _range(item: Reply, asked_host: str) -> tuple[int, int, Address] | None:
    """One entry of CLUSTER SLOTS; a master without a host is at the address that was asked."""
    match item:
        case [int() as first, int() as last, [host, int() as port, *_], *_] if (
            0 <= first <= last < NUM_SLOTS and 0 < port < 65536
        ):
            name = host.decode("utf-8", "replace") if isinstance(host, bytes) else ""
            return None if name == "?" else (first, last, (name or asked_host, port))
        case _:
            return None
