"""The lookups in progress: what one request waits for, holds, and was answered. Pure state."""

from __future__ import annotations

from kvstrata.cache.gate import Decision
from kvstrata.cache.index import Entry, entry_key
from kvstrata.cache.spans import LookupSpan
from kvstrata.cache.walk import Candidates
from kvstrata.metrics import L1
from kvstrata.types import Hit, MissReason, Namespace, Piece, Prefix


class Lookup:
    """One request's lookup, from its first call until its release."""

    __slots__ = (
        "answered_at",
        "candidates",
        "deadline",
        "decisions",
        "fetched",
        "first_block",
        "first_token",
        "held_by_tier",
        "hit",
        "is_planned",
        "late",
        "leased",
        "load_seconds",
        "namespace",
        "order",
        "prefix",
        "probed",
        "reason",
        "released",
        "request_id",
        "seconds",
        "span",
        "started_at",
        "waiting_for",
    )

    def __init__(
        self,
        request_id: str,
        namespace: Namespace,
        prefix: Prefix,
        now: float,
        deadline: float,
        first_token: int = 0,
    ) -> None:
        self.request_id = request_id
        self.namespace = namespace
        self.prefix = prefix
        self.first_token = first_token
        """What is before its chunk is not asked for: the inference engine has it."""
        self.started_at = now
        self.deadline = deadline
        self.late = MissReason.DEADLINE
        """What it means when the deadline passes."""
        self.probed = False
        """Whether the lower tiers were asked."""
        self.order: list[int] = []
        """The tiers, the one to read from first in front."""
        self.candidates = Candidates(namespace, prefix, 0)
        """What they were asked for."""
        self.waiting_for: set[int] = set()
        """Tiers that have not answered yet."""
        self.held_by_tier: dict[int, bytes] = {}
        """Their answers: 1 or 0 for each of ``candidates``, shard by shard."""
        self.is_planned = False
        """Whether it is decided what to read from them."""
        self.decisions: list[Decision] = []
        """What the gate said to that."""
        self.load_seconds: dict[str, float] = {}
        """By tier, how long its reads took in the end."""
        self.fetched: dict[bytes, str] = {}
        """Names of the tiers that supplied entries for this lookup, by index key."""
        self.leased: dict[Entry, None] = {}
        """What it holds. Not by key: one that was dropped meanwhile may have a successor under the same key."""
        self.reason: MissReason | None = None
        """Why less was loaded than the tiers hold."""
        self.hit: Hit | None = None
        """The answer, once there is one."""
        self.first_block = 0
        """Where the walk that was answered with began."""
        self.answered_at = 0.0
        """When it was answered, in Unix seconds."""
        self.seconds = 0.0
        """How long that took."""
        self.released = False
        self.span: LookupSpan | None = None
        """Its part of the request's trace; None while tracing is off."""

    def asks(self, namespace: Namespace, prefix: Prefix, first_token: int) -> bool:
        """Whether this is the same question."""
        return self.namespace is namespace and self.first_token == first_token and self.prefix == prefix

    def be_patient(self, seconds: float, since: float) -> None:
        """Wait no longer than so, because the gate says that computing takes less."""
        if since + seconds < self.deadline:
            self.deadline, self.late = since + seconds, MissReason.GATED

    def lease(self, entry: Entry) -> None:
        """Hold an entry, once."""
        if entry not in self.leased:
            entry.leases += 1
            self.leased[entry] = None

    def source(self, piece: Piece) -> str:
        """Where a piece of the hit came from: the tier that supplied a shard of it, else L1."""
        keys = (entry_key(piece.chunk_hash, shard) for shard in range(self.namespace.world_size))
        return next((name for key in keys if (name := self.fetched.get(key))), L1)

    def tier_holding(self, position: int, shard: int) -> int | None:
        """The tier to read a shard of a candidate from: the first in order that holds it, of those whose answer is
        not preceded by one that is still awaited."""
        i = position * self.namespace.world_size + shard
        for tier in self.order:
            if tier in self.waiting_for:
                return None
            if (held := self.held_by_tier.get(tier)) is not None and held[i]:
                return tier
        return None

    def tiers_holding(self, position: int, shard: int) -> int:
        """The bit mask of all tiers that said to hold it."""
        i = position * self.namespace.world_size + shard
        return sum(1 << tier for tier, held in self.held_by_tier.items() if held[i])
