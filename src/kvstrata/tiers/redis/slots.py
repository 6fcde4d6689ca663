"""Names to slots, as Redis Cluster does it, and slots to the servers of a ring."""

from __future__ import annotations

import binascii
from collections.abc import Sequence

import xxhash

from kvstrata.tiers.redis.server import Server
from kvstrata.tiers.redis.topology import Route

NUM_SLOTS = 16384


def slot_of(name: bytes) -> int:
    """CRC16 (XMODEM) of the name, or of its hash tag ``{...}``, modulo 16384.

    https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#key-distribution-model
    """
    start = name.find(b"{")
    if start >= 0:
        stop = name.find(b"}", start + 1)
        if stop > start + 1:
            name = name[start + 1 : stop]
    return binascii.crc_hqx(name, 0) & (NUM_SLOTS - 1)


def share_slots(labels: Sequence[str]) -> list[int]:
    """For each slot the position of its server in ``labels``, by highest random weight (rendezvous hashing).

    The same on every host and in any order of the labels. A label more takes its share from all others, a label
    less leaves its share to all others; no other slot moves.
    """
    weights = [
        [xxhash.xxh3_64_intdigest(f"{slot}@{label}".encode()) for slot in range(NUM_SLOTS)]
        for label in labels
    ]
    positions = range(len(labels))
    return [max(positions, key=lambda at: (weights[at][slot], labels[at])) for slot in range(NUM_SLOTS)]


def route_by_slot(names: Sequence[bytes], table: Sequence[Server | None]) -> list[Route]:
    """The names by the server of their slot; servers in outage, and slots without a server, are left out."""
    positions: dict[Server | None, list[int]] = {}
    for at, name in enumerate(names):
        positions.setdefault(table[slot_of(name)], []).append(at)
    routes = []
    for server, own in sorted(positions.items(), key=lambda item: item[0].name if item[0] else ""):
        if server is None:
            routes.append(Route(None, own, "no server serves the slot"))
        elif server.outage.is_over():
            routes.append(Route(server, own))
        else:
            routes.append(Route(None, own, server.outage.reason or f"{server.name} is being probed"))
    return routes
