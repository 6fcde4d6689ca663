"""The lookups in progress: what one request waits for, holds, and was answered. Pure state."""

from __future__ import annotations

from kvstrata.cache.index import Entry
from kvstrata.types import Hit, MissReason, Namespace, Piece, Prefix


class Lookup:
    """One request's lookup, from its first call until its release."""

    __slots__ = (
        "candidates",
        "deadline",
        "fetched",
        "held_by_tier",
        "hit",
        "leased",
        "namespace",
        "prefix",
        "probed",
        "reason",
        "released",
        "started_at",
        "waiting_for",
    )

    def __init__(self, namespace: Namespace, prefix: Prefix, now: float, deadline: float) -> None:
        self.namespace = namespace
        self.prefix = prefix
        self.started_at = now
        self.deadline = deadline
        self.probed = False
        """Whether the lower tiers were asked."""
        self.candidates: list[Piece] = []
        """What they were asked for."""
        self.waiting_for: set[int] = set()
        """Tiers that have not answered yet."""
        self.held_by_tier: dict[int, list[bool]] = {}
        """Their answers, for ``candidates`` times shards."""
        self.fetched: dict[bytes, str] = {}
        """Names of the tiers that supplied entries for this lookup, by index key."""
        self.leased: dict[bytes, Entry] = {}
        self.reason: MissReason | None = None
        """Why less was loaded than the tiers hold."""
        self.hit: Hit | None = None
        """The answer, once there is one."""
        self.released = False

    def lease(self, entry: Entry) -> None:
        """Hold an entry, once."""
        if entry.key not in self.leased:
            entry.leases += 1
            self.leased[entry.key] = entry

    def tiers_holding(self, index: int) -> list[int | None]:
        """For candidate ``index`` and each shard: the first tier that holds it."""
        shards = self.namespace.world_size
        answers = sorted(self.held_by_tier.items())
        return [
            next((tier for tier, held in answers if held[index * shards + shard]), None)
            for shard in range(shards)
        ]
