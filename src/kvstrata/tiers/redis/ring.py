"""Several plain servers that know nothing of each other: each serves the slots that hashing gives it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvstrata.tiers.redis.server import Server
from kvstrata.tiers.redis.slots import NUM_SLOTS, route_by_slot, share_slots
from kvstrata.tiers.redis.topology import Route, Topology

log = logging.getLogger(__name__)


class RingTopology(Topology):
    """Consistent hashing over plain servers. What a lost server has is missed until it is back."""

    def __init__(self, servers: Sequence[Server]) -> None:
        """Hosts find the same entries when they write the servers' addresses alike, in any order."""
        super().__init__(servers[0].limits)
        self._servers = list(servers)
        labels = [f"{server.endpoint.address}/{server.endpoint.db}" for server in servers]
        shares = share_slots(labels)
        self._table = [servers[at] for at in shares]
        parts = [f"{label} {shares.count(at) * 100 / NUM_SLOTS:.0f}%" for at, label in enumerate(labels)]
        log.info("entries are shared by %d servers: %s", len(labels), ", ".join(parts))

    def route(self, names: Sequence[bytes], *, is_write: bool) -> list[Route]:  # noqa: ARG002
        return route_by_slot(names, self._table)

    def servers(self) -> list[Server]:
        return self._servers

    def lost(self, server: Server, reason: str) -> bool:
        server.outage.begin(reason)
        return False

    @property
    def is_partly_up(self) -> bool:
        return not all(server.outage.reason for server in self._servers)

    def close(self) -> None:
        for server in self._servers:
            server.close()
