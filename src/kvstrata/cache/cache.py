"""The core: lookup, prefetch, reserve, commit, release, clear over L1 and the tiers.

Every method takes the lock, changes state, and returns or hands on the I/O that is to be done; the I/O happens
after the lock is released, on the threads of ``cache.io``. No method waits for I/O.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from kvstrata.cache.frames import Transfer, prepare, transfer_of
from kvstrata.cache.gate import Gate
from kvstrata.cache.index import Entry, Index, State, entry_key
from kvstrata.cache.io import TierIO
from kvstrata.cache.lookups import Lookup
from kvstrata.cache.prefetch import hold, plan_pieces, worth_loading
from kvstrata.cache.walk import Walk, first_missing, missing_candidates, walk
from kvstrata.frame import HEADER_BYTES
from kvstrata.metrics import Metrics
from kvstrata.types import NO_HIT, PENDING, Hit, Miss, MissReason, Namespace, Piece, Prefix, Slot

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
        lookup_timeout_seconds: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.pool_id = pool_id
        self.index = index
        self.tiers = tiers
        self.metrics = metrics
        self.gate = gate
        self.keep_in_l1 = keep_in_l1
        """False: L1 only passes data on to and from the tiers."""
        self.stores_frozen = False
        """An operator wants nothing new to be stored; what is held is served on."""
        self._lookup_timeout_seconds = lookup_timeout_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._namespaces: dict[Namespace, Namespace] = {}
        self._lookups: dict[tuple[str, str], Lookup] = {}
        self._reserved: dict[tuple[str, bytes], tuple[Entry, Transfer]] = {}
        self._num_clears = 0
        self._cleared_at: dict[Namespace | None, int] = {}
        """The number of the last clear of each namespace, or of everything."""
        self._clearing: dict[int, list[Namespace | None]] = {i: [] for i in range(len(tiers))}

    def intern(self, namespace: Namespace) -> Namespace:
        """The one object that stands for a namespace in this core; entries compare namespaces by identity."""
        with self._lock:
            return self._namespaces.setdefault(namespace, namespace)

    # Lookup

    def lookup(self, owner: str, request_id: str, namespace: Namespace, prefix: Prefix) -> Hit:
        """See ``client.base.Client.lookup``. ``namespace`` is interned."""
        now = self._clock()
        with self._lock:
            lookup = self._lookups.get((owner, request_id))
            if lookup is not None and (lookup.prefix != prefix or lookup.namespace is not namespace):
                if lookup.hit is not None:  # its payloads may be in use, and are another prompt's
                    return NO_HIT
                self._release(owner, request_id)
                lookup = None
            if lookup is None:
                lookup = Lookup(namespace, prefix, now, now + self._lookup_timeout_seconds)
                self._lookups[owner, request_id] = lookup
            hit, jobs = self._advance(lookup, now)
            if hit.num_tokens == 0 and not hit.pending:
                self._release(owner, request_id)
        for job in jobs:
            job()
        return hit

    def _advance(self, lookup: Lookup, now: float) -> tuple[Hit, list[Job]]:
        """The answer as of now, and what to ask the tiers."""
        if lookup.hit is not None:
            return lookup.hit, []
        expired = now >= lookup.deadline
        reached = walk(self.index, lookup.namespace, lookup.prefix, wait=not expired)
        if reached.complete:
            return self._finish(lookup, reached), []
        if expired:
            return self._expire(lookup, reached)
        if not lookup.probed and not reached.loading and self.tiers:
            return PENDING, self._probe(lookup, reached)
        if reached.loading or lookup.waiting_for:
            for shards in reached.entries:
                for entry in shards:
                    lookup.lease(entry)
            for entry in reached.loading:
                lookup.lease(entry)
            return PENDING, []
        return self._finish(lookup, reached), []

    def _expire(self, lookup: Lookup, reached: Walk) -> tuple[Hit, list[Job]]:
        """The deadline has passed: the answer is what has arrived."""
        stalled = [self.tiers[tier].stalled for tier in lookup.waiting_for]
        lookup.waiting_for.clear()
        lookup.reason = MissReason.DEADLINE
        return self._finish(lookup, reached), stalled

    def _finish(self, lookup: Lookup, reached: Walk) -> Hit:
        for shards in reached.entries:
            for entry in shards:
                lookup.lease(entry)
        by_tier: dict[str, int] = {}
        for piece, shards in zip(reached.pieces, reached.entries, strict=True):
            tier = next((name for e in shards if (name := lookup.fetched.get(e.key))), "l1")
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
        self.metrics.looked_up(lookup.prefix.num_tokens, by_tier, reason, self._clock() - lookup.started_at)
        return lookup.hit

    def _why_missing(self, lookup: Lookup, reached: Walk) -> MissReason:
        first = first_missing(lookup.namespace, lookup.prefix, reached.next_block)
        return MissReason.ABSENT if first is None else self.index.why_missing(first.chunk_hash, 0)

    # Prefetch

    def _probe(self, lookup: Lookup, reached: Walk) -> list[Job]:
        """Ask all tiers at once what they hold beyond ``reached``."""
        lookup.probed = True
        for shards in reached.entries:
            for entry in shards:
                lookup.lease(entry)
        lookup.candidates = missing_candidates(lookup.namespace, lookup.prefix, reached.next_block)
        keys = [
            lookup.namespace.key(piece.chunk_hash, shard)
            for piece in lookup.candidates
            for shard in range(lookup.namespace.world_size)
        ]
        asked = [i for i in range(len(self.tiers)) if not self._is_clearing(i, lookup.namespace)]
        lookup.waiting_for = set(asked)
        expires_at = time.monotonic() + lookup.deadline - self._clock()
        return [
            partial(self.tiers[i].contains, keys, expires_at, partial(self._probed, lookup, i)) for i in asked
        ]

    def _probed(self, lookup: Lookup, tier: int, held: list[bool] | None) -> None:
        """A tier answered; on its look-up thread, or on the caller's when it is down."""
        with self._lock:
            if lookup.hit is not None or lookup.released:
                return
            lookup.waiting_for.discard(tier)
            if held is None:
                lookup.reason = MissReason.TIER_DOWN
            elif not self._is_clearing(tier, lookup.namespace):
                lookup.held_by_tier[tier] = held
            jobs = [] if lookup.waiting_for else self._plan_reads(lookup)
        for job in jobs:
            job()

    def _plan_reads(self, lookup: Lookup) -> list[Job]:
        """Reserve slots for what the tiers hold and is worth loading."""
        names = [tier.name for tier in self.tiers]
        plan, slow = worth_loading(plan_pieces(self.index, lookup), lookup, self.gate, names, self._clock())
        if slow is not None:
            lookup.reason = MissReason.GATED
            self.metrics.gated(slow)
        reads, had_room = hold(self.index, lookup, plan, names)
        if not had_room:
            lookup.reason = MissReason.NO_SPACE
        jobs: list[Job] = []
        for tier in sorted({read.tier for read in reads}):
            mine = [read for read in reads if read.tier == tier]
            transfers = [self._transfer(read.entry, read.piece) for read in mine]
            entries = {t.key: read.entry for t, read in zip(transfers, mine, strict=True)}
            done = partial(self._loaded, lookup, tier, entries)
            jobs.append(partial(self.tiers[tier].read, transfers, done, partial(self._measured, tier)))
        return jobs

    def _loaded(
        self,
        lookup: Lookup,
        tier: int,
        entries: dict[str, Entry],
        transfers: Sequence[Transfer],
        outcome: Sequence[Miss | None],
    ) -> None:
        """A batch was read; on a read thread of the tier."""
        with self._lock:
            for transfer, miss in zip(transfers, outcome, strict=True):
                entry = entries[transfer.key]
                if miss is None:
                    entry.tiers |= 1 << tier
                    if entry.state is State.LOADING:
                        entry.state = State.READY
                else:
                    lookup.reason = lookup.reason or miss.reason
                    if entry.state is State.LOADING:
                        self.index.drop(entry)
                self._unlease(entry)

    def _measured(self, tier: int, num_bytes: int, seconds: float) -> None:
        """A read from a tier has ended."""
        with self._lock:
            self.gate.read(self.tiers[tier].name, num_bytes, seconds, self._clock())

    # Store

    def reserve(
        self, owner: str, namespace: Namespace, shard: int, pieces: Sequence[Piece]
    ) -> list[Slot | None]:
        """Slots for the pieces that are not held; None for those that are, or for which there is no room."""
        if self.stores_frozen:
            self.metrics.stores_dropped.inc(len(pieces))
            return [None] * len(pieces)
        slots: list[Slot | None] = []
        jobs: list[Job] = []
        with self._lock:
            for piece in pieces:
                entry = self.index.get(piece.chunk_hash, shard)
                if (owner, entry_key(piece.chunk_hash, shard)) in self._reserved:
                    # Also when it was dropped since: its commit must not be taken for that of a new slot.
                    slots.append(None)
                elif entry is not None:
                    slots.append(None)
                    if entry.state is State.READY:
                        jobs += self._plan_writes(entry, self._transfer(entry, piece))
                else:
                    slots.append(self._reserve_new(owner, namespace, shard, piece))
        for job in jobs:
            job()
        return slots

    def _reserve_new(self, owner: str, namespace: Namespace, shard: int, piece: Piece) -> Slot | None:
        entry = self.index.insert(namespace, piece, shard, State.WRITING)
        if entry is None:
            self.metrics.stores_dropped.inc()
            return None
        transfer = self._transfer(entry, piece)
        prepare(transfer)
        self._reserved[owner, entry.key] = entry, transfer
        return Slot(entry.offset + HEADER_BYTES, entry.payload_bytes)

    def commit(self, owner: str, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """Reserved payloads are complete: make them visible, and write them to the tiers in the background."""
        jobs: list[Job] = []
        with self._lock:
            committed = []
            for chunk_hash in chunk_hashes:
                entry, transfer = self._reserved.pop((owner, entry_key(chunk_hash, shard)), (None, None))
                if entry is None or transfer is None:
                    continue
                if entry.state is State.WRITING:
                    entry.state = State.READY
                    committed.append(entry)
                    jobs += self._plan_writes(entry, transfer)
                self._unlease(entry)
            self.index.touch(committed)
            self.metrics.stored(sum(e.num_tokens for e in committed), sum(e.payload_bytes for e in committed))
        for job in jobs:
            job()

    def abort(self, owner: str, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """Reserved slots are given back; nothing was stored."""
        with self._lock:
            for chunk_hash in chunk_hashes:
                self._abort(owner, entry_key(chunk_hash, shard))

    def _abort(self, owner: str, key: bytes) -> None:
        entry, _ = self._reserved.pop((owner, key), (None, None))
        if entry is None:
            return
        if entry.state is State.WRITING:
            self.index.drop(entry)
        self.index.unlease(entry)

    def _plan_writes(self, entry: Entry, transfer: Transfer) -> list[Job]:
        """Lease the entry once per tier that lacks it, and write it there."""
        jobs: list[Job] = []
        for i in range(len(self.tiers)):
            if entry.tiers & (1 << i) or not self.tiers[i].stores or self._is_clearing(i, entry.namespace):
                continue
            entry.tiers |= 1 << i
            entry.leases += 1
            jobs.append(partial(self._write, i, entry, transfer, self._num_clears))
        return jobs

    def _write(self, tier: int, entry: Entry, transfer: Transfer, planned_at: int) -> None:
        """Queue a write that was planned after so many clears."""
        is_wanted = partial(self._is_wanted, entry.namespace, planned_at)
        if not self.tiers[tier].write(transfer, partial(self._written, tier, entry), is_wanted):
            self._written(tier, entry, False)

    def _is_wanted(self, namespace: Namespace, planned_at: int) -> bool:
        """Whether nothing cleared the tiers since: a write may be queued later than the clear that it preceded."""
        return max(self._cleared_at.get(namespace, 0), self._cleared_at.get(None, 0)) <= planned_at

    def _written(self, tier: int, entry: Entry, written: bool) -> None:
        """A tier has it, or not; on the tier's write thread, or on the caller's when the write was dropped."""
        with self._lock:
            if not written:
                entry.tiers &= ~(1 << tier)
            self._unlease(entry)

    def _unlease(self, entry: Entry) -> None:
        self.index.unlease(entry)
        if not self.keep_in_l1 and entry.leases == 0 and entry.state is State.READY:
            self.index.drop(entry)

    def _transfer(self, entry: Entry, piece: Piece) -> Transfer:
        return transfer_of(self.pool, entry, piece.tokens_hash, int(time.time()))

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
        for entry in lookup.leased.values():
            self._unlease(entry)
        lookup.leased.clear()

    def drop_owner(self, owner: str) -> None:
        """An owner is known to be gone: its lookups end and its reservations are given back.

        Only call this when no process can still write to the owner's slots.
        """
        with self._lock:
            for _, request_id in [key for key in self._lookups if key[0] == owner]:
                self._release(owner, request_id)
            for _, key in [key for key in self._reserved if key[0] == owner]:
                self._abort(owner, key)

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
        copies = [
            bytes(self.pool[start : start + e.payload_bytes]) for start, e in zip(starts, held, strict=True)
        ]
        with self._lock:
            for entry in held:
                self._unlease(entry)
        return copies

    def reserved_payload(self, owner: str, shard: int, chunk_hash: bytes) -> memoryview | None:
        """The payload of a reservation, for a client that cannot map the pool."""
        with self._lock:
            _, transfer = self._reserved.get((owner, entry_key(chunk_hash, shard)), (None, None))
            return None if transfer is None else transfer.payload

    # Operations

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Index]:
        """The index, under the core's lock: for short state changes that a person asked for. No I/O."""
        with self._lock:
            yield self.index

    def namespaces(self) -> list[Namespace]:
        """The namespaces that clients have registered since the start."""
        with self._lock:
            return list(self._namespaces)

    def report_prefill(self, namespace: Namespace, num_tokens: int, seconds: float) -> None:
        """See ``client.base.Client.report_prefill``."""
        with self._lock:
            self.gate.prefilled(namespace.fingerprint, num_tokens, seconds, self._clock())

    def _is_clearing(self, tier: int, namespace: Namespace) -> bool:
        return any(scope is None or scope is namespace for scope in self._clearing[tier])

    def clear(self, namespace: Namespace | None = None, *, tiers: bool = True) -> int:
        """Drop a namespace, or everything, from L1 now, and from the tiers in the background if they are meant."""
        jobs: list[Job] = []
        with self._lock:
            entries = self.index.of_namespace(namespace)
            for entry in entries:
                self.index.drop(entry)
            if not tiers:
                return len(entries)
            self._num_clears += 1
            self._cleared_at[namespace] = self._num_clears
            for lookup in self._lookups.values():
                if namespace is None or lookup.namespace is namespace:
                    lookup.held_by_tier.clear()
            prefix = "" if namespace is None else namespace.key_prefix
            for i, tier in enumerate(self.tiers):
                self._clearing[i].append(namespace)
                jobs.append(partial(tier.clear, prefix, partial(self._cleared, i, namespace)))
        for job in jobs:
            job()
        return len(entries)

    def _cleared(self, tier: int, namespace: Namespace | None) -> None:
        with self._lock:
            self._clearing[tier].remove(namespace)

    def keys(self, prefix: str = "", limit: int = 1000) -> list[str]:
        """Readable keys of L1 that begin with ``prefix``, at most ``limit``."""
        with self._lock:
            entries = list(self.index.entries.values())
        keys = (e.namespace.key(e.chunk_hash, e.shard) for e in entries if e.state is State.READY)
        return list(itertools.islice((key for key in keys if key.startswith(prefix)), max(0, limit)))

    def l1_stats(self) -> dict[str, int]:
        """Sizes and counts of L1 as of now."""
        with self._lock:
            allocator = self.index.allocator
            return {
                "entries": len(self.index),
                "used_bytes": allocator.used_bytes,
                "budget_bytes": allocator.budget_bytes,
                "capacity_bytes": allocator.capacity_bytes,
                "largest_free_bytes": min(allocator.largest_free_bytes, allocator.budget_bytes),
                "evictions": self.index.num_evicted,
                "lookups": len(self._lookups),
                "reservations": len(self._reserved),
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

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Write what is queued, then end the threads and the tiers."""
        self.flush(timeout_seconds)
        for tier in self.tiers:
            tier.close()
