"""The core: lookup, prefetch, reserve, commit, release, clear over L1 and the tiers.

Every method takes the lock, changes state, and returns or hands on the I/O that is to be done; the I/O happens
after the lock is released, on the threads of ``cache.io``. No method waits for I/O.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from kvstrata.cache.clearing import Clearing
from kvstrata.cache.clears import Clears
from kvstrata.cache.explain import Explanation, explain, first_missing_pieces, others_with_tokens
from kvstrata.cache.gate import Gate
from kvstrata.cache.index import Index, State
from kvstrata.cache.io import TierIO
from kvstrata.cache.l1 import L1
from kvstrata.cache.lookups import Lookup
from kvstrata.cache.namespaces import Namespaces
from kvstrata.cache.popular import CommonPrefix, Popular, common_prefixes
from kvstrata.cache.prefetch import Prefetch
from kvstrata.cache.quotas import SaltQuotas
from kvstrata.cache.recent import Recent
from kvstrata.cache.spans import LookupSpan
from kvstrata.cache.stores import Stores
from kvstrata.cache.walk import Walk, first_missing, walk
from kvstrata.cache.writes import Writes
from kvstrata.frame import HEADER_BYTES
from kvstrata.metrics import Metrics
from kvstrata.tracing import Tracer
from kvstrata.types import NO_HIT, PENDING, Hit, MissReason, Namespace, Piece, Prefix, Slot

logger = logging.getLogger(__name__)

Job = Callable[[], None]
"""I/O to do once the lock is released."""


class Cache:
    """The cache core. Thread-safe.

    An **owner** is whoever must give back what it holds: a session of a server, or a local client.
    """

    def __init__(
        self,
        pool: memoryview,
        pool_id: str,
        index: Index,
        tiers: Sequence[TierIO],
        metrics: Metrics,
        *,
        gate: Gate,
        keep_in_l1: bool = True,
        read_fastest: bool = False,
        isolated: bool = False,
        lookup_timeout_seconds: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
    ) -> None:
        """Put a core together.

        Args:
            keep_in_l1: false: L1 only passes data on to and from the tiers.
            read_fastest: what several tiers hold is read from the one measured fastest, not from the first.
            isolated: nothing that belongs to a salt is listed, or told to requests of other salts.
        """
        self.pool = pool
        self.pool_id = pool_id
        self.index = index
        self.tiers = tiers
        self._tier_names = [tier.name for tier in tiers]
        self.metrics = metrics
        self.gate = gate
        self.isolated = isolated
        self.stores_frozen = False
        """An operator wants nothing new to be stored, in no tier; what is held is served on."""
        self._lookup_timeout_seconds = lookup_timeout_seconds
        self._clock = clock
        self._tracer = tracer
        self._l1 = L1(pool, index, keep=keep_in_l1)
        self._lock = self._l1.lock
        self._clears = Clears(len(tiers))
        self._writes = Writes(self._l1, tiers, self._clears, gate, clock)
        self._stores = Stores(self._l1, self._writes, metrics, tracer)
        self._prefetch = Prefetch(
            self._l1, tiers, self._clears, gate, metrics, read_fastest=read_fastest, clock=clock
        )
        self._namespaces = Namespaces(tiers)
        self._lookups: dict[tuple[str, str], Lookup] = {}
        self._clearing = Clearing(self._l1, tiers, self._clears, self._lookups)
        self._recent = Recent(isolated=isolated)
        self._popular = Popular(isolated=isolated)
        self.quotas = SaltQuotas(self._l1, tiers)

    def intern(self, namespace: Namespace) -> Namespace:
        """The one object that stands for a namespace in this core; entries compare namespaces by identity.

        Raises:
            LayoutError: a tier has a codec that cannot encode its KV.
        """
        return self._namespaces.intern(namespace)

    # Lookup

    def lookup(
        self,
        owner: str,
        request_id: str,
        namespace: Namespace,
        prefix: Prefix,
        first_token: int = 0,
        traceparent: str = "",
    ) -> Hit:
        """See ``client.base.Client.lookup``. ``namespace`` is interned."""
        now = self._clock()
        with self._lock:
            lookup = self._lookups.get((owner, request_id))
            if lookup is not None and not lookup.asks(namespace, prefix, first_token):
                if lookup.hit is not None:  # its payloads may be in use, and are another prompt's
                    return NO_HIT
                self._release(owner, request_id)
                lookup = None
            if lookup is None:
                deadline = now + self._lookup_timeout_seconds
                lookup = Lookup(request_id, namespace, prefix, now, deadline, first_token)
                self._lookups[owner, request_id] = lookup
                if self._tracer is not None:
                    lookup.span = LookupSpan(self._tracer, request_id, namespace, prefix, traceparent)
            hit, jobs = self._advance(lookup, now)
            if hit.num_tokens == 0 and not hit.pending:
                self._release(owner, request_id)
        for job in jobs:
            job()
        return hit

    def _advance(self, lookup: Lookup, now: float) -> tuple[Hit, list[Job]]:
        """The answer as of now, and what to do besides: ask the tiers, or write to them what is used."""
        if lookup.hit is not None:
            return lookup.hit, []
        reached = self._walk(lookup, wait=now < lookup.deadline)
        if self._prefetch.is_given_up(reached.loading, now):
            lookup.be_patient(0.0, now)
            reached = self._walk(lookup, wait=False)
        if reached.complete:
            return self._finish(lookup, reached)
        if now >= lookup.deadline:
            return self._expire(lookup, reached)
        if not lookup.probed and not reached.loading and self._prefetch.is_possible:
            jobs = self._prefetch.begin(lookup, reached)
            if jobs:
                return PENDING, jobs
        if reached.loading or lookup.waiting_for:
            for entry in itertools.chain(*reached.entries, reached.loading):
                lookup.lease(entry)
            if not lookup.probed:
                self._prefetch.joined(lookup, reached.loading)
            return PENDING, []
        return self._finish(lookup, reached)

    def _walk(self, lookup: Lookup, *, wait: bool) -> Walk:
        return walk(self.index, lookup.namespace, lookup.prefix, lookup.first_token, wait=wait)

    def _expire(self, lookup: Lookup, reached: Walk) -> tuple[Hit, list[Job]]:
        """The deadline has passed: the answer is what has arrived."""
        stalled: list[Job] = []
        if lookup.late is MissReason.DEADLINE:
            waited_seconds = self._clock() - lookup.started_at
            stalled = [partial(self.tiers[tier].stalled, waited_seconds) for tier in lookup.waiting_for]
        lookup.waiting_for.clear()
        lookup.reason = lookup.late
        hit, jobs = self._finish(lookup, reached)
        return hit, stalled + jobs

    def _finish(self, lookup: Lookup, reached: Walk) -> tuple[Hit, list[Job]]:
        for entry in itertools.chain(*reached.entries):
            lookup.lease(entry)
        by_tier: dict[str, int] = {}
        for piece in reached.pieces:
            tier = lookup.source(piece)
            by_tier[tier] = by_tier.get(tier, 0) + piece.num_tokens
        shards_range = range(lookup.namespace.world_size)
        for shard in shards_range:
            self.index.touch(entries[shard] for entries in reached.entries)
        reason = None
        if not reached.complete:
            reason = lookup.reason or self._why_missing(lookup, reached)
        lookup.hit = Hit(
            num_tokens=reached.num_tokens,
            pieces=tuple(reached.pieces),
            offsets=tuple(
                tuple(entries[shard].offset + HEADER_BYTES for entries in reached.entries)
                for shard in shards_range
            ),
            pool_id=self.pool_id,
            tokens_by_tier=by_tier,
            miss_reason=reason,
        )
        lookup.first_block = reached.first_block
        self._answered(lookup, lookup.hit)
        if self.stores_frozen:
            return lookup.hit, []
        return lookup.hit, self._writes.used(itertools.chain(*reached.entries))

    def _answered(self, lookup: Lookup, hit: Hit) -> None:
        lookup.answered_at = time.time()
        lookup.seconds = seconds = self._clock() - lookup.started_at
        self._recent.add(lookup)
        self._popular.add(lookup)
        if lookup.span is not None:
            lookup.span.answered(hit)
        num_asked = lookup.prefix.num_tokens - lookup.first_block * lookup.namespace.layout.block_size
        self.metrics.looked_up(num_asked, hit.tokens_by_tier, hit.miss_reason, seconds)
        num_found = sum(hit.tokens_by_tier.values())
        saved = num_found and self.gate.prefill_seconds(lookup.namespace.fingerprint, num_found)
        if saved:
            self.metrics.prefill_saved(saved)

    def _why_missing(self, lookup: Lookup, reached: Walk) -> MissReason:
        first = first_missing(lookup.namespace, lookup.prefix, reached.next_block)
        reason = MissReason.ABSENT if first is None else self.index.why_missing(first.chunk_hash, 0)
        rest = lookup.prefix.num_tokens - reached.num_tokens
        is_end = reached.num_tokens > 0 and rest < lookup.namespace.chunk_size
        if reason is MissReason.ABSENT and is_end and reached.entries[-1][0].num_children:
            return (
                MissReason.CHUNK_ALIGNMENT
            )  # others go on from here, in chunks that hold more, or other tokens
        return reason

    # Explain

    def recent(self, limit: int) -> list[Explanation]:
        """The lookups that were answered last, the latest first."""
        with self._lock:
            found = list(itertools.islice(self._recent.listed(), limit))
        explanations = []
        for lookup in found:
            with self._lock:  # not once for all of them: each takes milliseconds that look-ups would wait
                explanations.append(explain(lookup, self._tier_names))
        return explanations

    def popular(self) -> list[CommonPrefix]:
        """The prefixes that look-ups have hit, those that brought the most tokens first."""
        with self._lock:
            ends = self._popular.ends()
        return common_prefixes(ends)

    def explain(self, request_id: str) -> Explanation | None:
        """Why a request hit what it hit; None when it is not among the last that were answered.

        Searches L1 for the tokens that were missing first: about a second for a million entries, without the lock.
        """
        with self._lock:
            lookup = self._recent.find(request_id)
            if lookup is None:
                return None
            explanation = explain(lookup, self._tier_names)
            entries = [] if explanation.reason is None else list(self.index.entries.values())
            pieces = first_missing_pieces(lookup) if entries else []
            stored = next((e for p in pieces if (e := self.index.get(p.chunk_hash, 0))), None)
        others = (
            () if stored is None else others_with_tokens(self.pool, stored, entries, same_salt=self.isolated)
        )
        return msgspec.structs.replace(explanation, same_tokens=others)

    # Store

    def reserve(
        self,
        owner: str,
        namespace: Namespace,
        shard: int,
        pieces: Sequence[Piece],
        traceparents: Sequence[str] = (),
    ) -> list[Slot | None]:
        """Slots for the pieces that are not held; None for those that are, or for which there is no room."""
        if self.stores_frozen:
            self.metrics.stores_dropped.inc(len(pieces))
            return [None] * len(pieces)
        return self._stores.reserve(owner, namespace, shard, pieces, traceparents)

    def commit(self, owner: str, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """Reserved payloads are complete: make them visible, and write them to the tiers in the background."""
        self._stores.commit(owner, shard, chunk_hashes)

    def abort(self, owner: str, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """Reserved slots are given back; nothing was stored."""
        self._stores.abort(owner, shard, chunk_hashes)

    # Giving back

    def release(self, owner: str, request_id: str) -> None:
        """End a lookup and its leases."""
        with self._lock:
            self._release(owner, request_id)

    def _release(self, owner: str, request_id: str) -> None:
        lookup = self._lookups.pop((owner, request_id), None)
        if lookup is None:
            return
        lookup.released = True
        if lookup.span is not None:
            lookup.span.abandoned()
        for entry in lookup.leased:
            self._l1.unlease(entry)
        lookup.leased.clear()

    def drop_owner(self, owner: str) -> None:
        """An owner is known to be gone: its lookups end and its reservations are given back.

        Only call this when no process can still write to the owner's slots.
        """
        with self._lock:
            for _, request_id in [key for key in self._lookups if key[0] == owner]:
                self._release(owner, request_id)
            self._stores.drop_owner(owner)

    def leased_payloads(
        self, owner: str, request_id: str, shard: int, chunk_hashes: Sequence[bytes]
    ) -> list[memoryview] | None:
        """The payloads of an answered lookup; None unless its pieces are those."""
        with self._lock:
            lookup = self._lookups.get((owner, request_id))
            if lookup is None or lookup.hit is None or not 0 <= shard < lookup.namespace.world_size:
                return None
            if [piece.chunk_hash for piece in lookup.hit.pieces] != list(chunk_hashes):
                return None
            sizes = [lookup.namespace.layout.payload_bytes(p.num_tokens) for p in lookup.hit.pieces]
            return [
                self.pool[offset : offset + size]
                for offset, size in zip(lookup.hit.offsets[shard], sizes, strict=True)
            ]

    def copy_payloads(
        self, namespace: Namespace, shard: int, chunk_hashes: Sequence[bytes]
    ) -> list[bytes] | None:
        """Copies of the payloads of entries that anybody holds leased; None unless all are there."""
        with self._lock:
            entries = [self.index.get(chunk_hash, shard) for chunk_hash in chunk_hashes]
            held = [
                e for e in entries if e is not None and e.state is State.READY and e.namespace is namespace
            ]
            if len(held) != len(entries):
                return None
            for entry in held:
                entry.leases += 1
        starts = [entry.offset + HEADER_BYTES for entry in held]
        try:
            return [bytes(self.pool[at : at + e.payload_bytes]) for at, e in zip(starts, held, strict=True)]
        finally:  # also when there is no memory for copies
            with self._lock:
                for entry in held:
                    self._l1.unlease(entry)

    def reserved_payload(self, owner: str, shard: int, chunk_hash: bytes) -> memoryview | None:
        """The payload of a reservation, for a client that cannot map the pool."""
        return self._stores.payload(owner, shard, chunk_hash)

    # Operations

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Index]:
        """The index, under the core's lock: for short state changes that a person asked for. No I/O."""
        with self._lock:
            yield self.index

    def is_being_cleared(self, tier: str, namespace: Namespace) -> bool:
        """Whether what ``tier`` still has of ``namespace`` is not to be used. Only inside ``guarded``."""
        return self._clears.is_running(self._tier_names.index(tier), namespace)

    def namespaces(self) -> list[Namespace]:
        """The namespaces that clients have registered since the start."""
        return self._namespaces.all()

    def report_prefill(self, namespace: Namespace, num_tokens: int, seconds: float) -> None:
        """See ``client.base.Client.report_prefill``."""
        with self._lock:
            self.gate.prefilled(namespace.fingerprint, num_tokens, seconds)

    def clear(self, namespace: Namespace | None = None, *, tiers: bool = True) -> int:
        """Do all of ``clearing`` at once; return how many entries it dropped from L1."""
        num_dropped = 0
        for count in self.clearing(namespace, tiers=tiers):
            num_dropped += count
            time.sleep(0)  # those that wait for the lock have it now, or the next step takes it again
        return num_dropped

    def clearing(
        self,
        namespace: Namespace | None = None,
        *,
        tiers: bool = True,
        deleted: Callable[[str, int], None] | None = None,
        ended: Callable[[str], None] | None = None,
    ) -> Iterator[int]:
        """Drop a namespace, or everything, from L1, and then from the tiers in the background if they are meant.

        In steps, between which others have their turn; yields how many entries of L1 each has dropped. What is
        stored after the first step stays, unless L1 held it still; what was stored before reaches no tier.

        Args:
            deleted: told how many entries a tier has deleted, part by part, on the tier's thread.
            ended: told which tier is cleared, likewise. Without it a tier that is away is left to a clear that
                waits for its return already.
        """
        return self._clearing.steps(namespace, tiers=tiers, deleted=deleted, ended=ended)

    def keys(self, prefix: str = "", limit: int = 1000) -> list[str]:
        """Readable keys of L1 that begin with ``prefix``, at most ``limit``."""
        with self._lock:
            entries = list(self.index.entries.values())
        ready = (e for e in entries if e.state is State.READY and not (self.isolated and e.salt_id))
        keys = (key for e in ready if (key := e.namespace.key(e.chunk_hash, e.shard)).startswith(prefix))
        return list(itertools.islice(keys, max(0, limit)))

    def l1_stats(self) -> dict[str, Any]:
        """Sizes and counts of L1 as of now."""
        with self._lock:
            allocator = self.index.allocator
            return {
                "entries": len(self.index),
                "used_bytes": allocator.used_bytes,
                "budget_bytes": allocator.budget_bytes,
                "capacity_bytes": allocator.capacity_bytes,
                "fragmentation": allocator.fragmentation,
                "budget_evictions": self.index.num_evicted_for_budget,
                "limit_evictions": self.index.num_evicted_for_limit,
                "evictions": self.index.num_evicted,
                "lookups": len(self._lookups),
                "reservations": len(self._stores),
            }

    def stats(self) -> dict[str, Any]:
        """A snapshot for the API. Asks the tiers, so it may take as long as they do."""
        with self._lock:
            rates = self.gate.estimates()
        tiers = [tier.stats() for tier in self.tiers]
        return {"l1": self.l1_stats(), "tiers": tiers, "rates": rates, "totals": self.metrics.totals()}

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all queued writes have ended; whether they have."""
        deadline = time.monotonic() + timeout_seconds
        while any(tier.queued_bytes for tier in self.tiers):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Write what is queued, then end the threads and the tiers; all of it within about ``timeout_seconds``.

        What hangs is given up: its threads are daemons, and end with the process.
        """
        deadline = time.monotonic() + timeout_seconds
        self.flush(0.8 * timeout_seconds)
        for tier in self.tiers:
            tier.end()
        for tier in self.tiers:
            tier.close(deadline)
