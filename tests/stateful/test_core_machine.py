"""The core as a state machine, against a model that is a dict of what was committed.

The model says of every key which contents were committed since the last clear. Whatever the core delivers is one
of them, to the byte, while slots are few and the tiers fail, lie and are slow; what is leased or reserved is
nobody else's; in the end nothing is held.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from dataclasses import dataclass

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.cache.index import Entry, Index
from kvstrata.config import WritePolicy
from kvstrata.hashing import PrefixHasher, full_chunks, tail_pieces
from kvstrata.policies.lru import LRUPolicy
from kvstrata.policies.s3fifo import S3FIFOPolicy
from kvstrata.testing.core import open_core, payloads, settle, wait_lookup
from kvstrata.testing.faults import Faults, FaultyTier
from kvstrata.tiers.dict import DictTier
from kvstrata.types import Hit, KVLayout, Namespace, Prefix

BLOCK_SIZE = 2
CHUNK_SIZE = 6
LAYOUT = KVLayout(block_size=BLOCK_SIZE, page_bytes=(500, 700), dtype="bfloat16", kernel_format="test")
SPACES = tuple(
    Namespace("vllm", model, "fp", "auto", shards, f"tp{shards}", CHUNK_SIZE, LAYOUT)
    for model, shards in (("one", 1), ("two", 2))
)
OWNERS = ("scheduler", "worker")
Key = tuple[Namespace, bytes, int]

# Few tokens and few choices, so that sequences share prefixes, diverge inside chunks and end in tails.
sequences = st.tuples(
    st.sampled_from(SPACES),
    st.builds(
        lambda blocks, rest: [token for block in blocks for token in (block, block)] + rest,
        st.lists(st.sampled_from([7, 7, 7, 8]), max_size=10),
        st.sampled_from([[], [7]]),
    ),
)

# What is pending, leased or held depends on threads, and Hypothesis wants to draw the same each time: so a number
# is drawn always, and picks among what there is.
picks = st.integers(0, 1000)


FAULTS = [
    Faults(),
    Faults(delay_seconds=0.004),
    Faults(error_rate=0.3),
    Faults(error_rate=1.0),
    Faults(full=True),
    Faults(lost_rate=0.3),
    Faults(truncated_rate=0.3),
    Faults(flipped_rate=0.3, delay_seconds=0.004),
    Faults(swapped_rate=0.5),
    Faults(swapped_rate=0.5, flipped_rate=0.1, lost_rate=0.1, error_rate=0.1),
]


class Sequence:
    def __init__(self, namespace: Namespace, tokens: list[int]) -> None:
        self.namespace = namespace
        hasher = PrefixHasher(namespace)
        hasher.extend(tokens)
        self.prefix: Prefix = hasher.prefix(tokens)
        chunks = full_chunks(hasher, CHUNK_SIZE, 0, len(tokens) // CHUNK_SIZE)
        self.pieces = chunks + tail_pieces(self.prefix, BLOCK_SIZE, CHUNK_SIZE)


@dataclass
class Reserved:
    owner: str
    namespace: Namespace
    shard: int
    contents: dict[bytes, tuple[int, bytes]]
    """By chunk hash: offset and what was written there."""
    is_dropped: bool = False
    """Cleared before its end: it never becomes visible."""


@dataclass
class Leased:
    namespace: Namespace
    hit: Hit
    copies: list[list[bytes]]


class WatchedIndex(Index):
    """Checks what is evicted."""

    def drop(self, entry: Entry, *, evicted: bool = False) -> None:
        if evicted:
            assert entry.leases == 0
            children = [other for other in self.entries.values() if other.parent == entry.key]
            assert children == [], "a prefix was evicted while its continuation is held"
        super().drop(entry, evicted=evicted)


class Core(RuleBasedStateMachine):
    pool_bytes = 16 * 4096
    hostile = True

    @initialize(
        num_tiers=st.sampled_from([1, 2, 1, 0]),
        policy=st.sampled_from([LRUPolicy, S3FIFOPolicy]),
        keep_in_l1=st.sampled_from([True, True, False]),
        seed=st.integers(0, 2**32),
        first=st.lists(sequences, max_size=3),
        faults=st.sampled_from(FAULTS),
        write_policies=st.lists(
            st.sampled_from(["all", "all", "second_use", "none"]), min_size=2, max_size=2
        ),
        read_fastest=st.booleans(),
    )
    def open(
        self,
        num_tiers: int,
        policy: type[LRUPolicy],
        keep_in_l1: bool,
        seed: int,
        first: list[tuple[Namespace, list[int]]],
        faults: Faults,
        write_policies: list[WritePolicy],
        read_fastest: bool,
    ) -> None:
        self.keep_in_l1 = keep_in_l1 or num_tiers == 0
        self.random = random.Random(seed)
        self.skipped_seconds = 0.0
        self.tiers = [FaultyTier(DictTier(), seed=seed + number) for number in range(num_tiers)]
        self.stack = contextlib.ExitStack()
        self.cache = self.stack.enter_context(
            open_core(
                self.tiers,
                pool_bytes=self.pool_bytes,
                policy=policy(),
                index=WatchedIndex,
                keep_in_l1=self.keep_in_l1,
                write_policies=write_policies,
                read_fastest=read_fastest,
                clock=lambda: time.monotonic() + self.skipped_seconds,
                probe_seconds=0.01,
            )
        )
        self.spaces = {namespace: self.cache.intern(namespace) for namespace in SPACES}
        self.committed: dict[Key, set[bytes]] = {}
        self.reserved: list[Reserved] = []
        self.leased: dict[tuple[str, str], Leased] = {}
        self.pending: dict[tuple[str, str], Sequence] = {}
        self.was_emptied = False
        self.names = itertools.count()
        self.known: list[tuple[Namespace, list[int]]] = []
        for drawn in first:
            self.store(drawn)
        settle(self.cache)
        for tier in self.tiers:
            tier.faults = faults if self.hostile else Faults()

    def sequence(self, drawn: tuple[Namespace, list[int]]) -> Sequence:
        return Sequence(self.spaces[drawn[0]], drawn[1])

    # Stores

    @rule(drawn=sequences)
    def store(self, drawn: tuple[Namespace, list[int]]) -> None:
        for shard in range(drawn[0].world_size):
            self.reserve(drawn, "worker", shard)
            self.end(self.reserved[-1], commit=True)

    @rule(drawn=sequences, owner=st.sampled_from(OWNERS), shard=st.integers(0, 1))
    def reserve(self, drawn: tuple[Namespace, list[int]], owner: str, shard: int) -> None:
        self.known.append(drawn)
        sequence = self.sequence(drawn)
        shard %= sequence.namespace.world_size
        slots = self.cache.reserve(owner, sequence.namespace, shard, sequence.pieces)
        contents = {}
        for piece, slot in zip(sequence.pieces, slots, strict=True):
            if slot is not None:
                assert slot.payload_bytes == LAYOUT.payload_bytes(piece.num_tokens)
                content = self.random.randbytes(slot.payload_bytes)
                self.cache.pool[slot.offset : slot.offset + slot.payload_bytes] = content
                contents[piece.chunk_hash] = slot.offset, content
        self.reserved.append(Reserved(owner, sequence.namespace, shard, contents))

    @rule(pick=picks, commit=st.booleans())
    def end_one(self, pick: int, commit: bool) -> None:
        if self.reserved:
            self.end(self.reserved[pick % len(self.reserved)], commit=commit)

    def end(self, reserved: Reserved, *, commit: bool) -> None:
        self.reserved.remove(reserved)
        if commit:
            if not reserved.is_dropped:
                for chunk_hash, (_, content) in reserved.contents.items():
                    key = reserved.namespace, chunk_hash, reserved.shard
                    self.committed.setdefault(key, set()).add(content)
            self.cache.commit(reserved.owner, reserved.shard, list(reserved.contents))
        else:
            self.cache.abort(reserved.owner, reserved.shard, list(reserved.contents))

    # Look-ups

    @rule(drawn=sequences, owner=st.sampled_from(OWNERS), wait=st.booleans())
    def lookup_anything(self, drawn: tuple[Namespace, list[int]], owner: str, wait: bool) -> None:
        self.lookup(drawn, owner, wait)

    def lookup(self, drawn: tuple[Namespace, list[int]], owner: str, wait: bool) -> None:
        request = owner, f"r{next(self.names)}"
        sequence = self.sequence(drawn)
        self.pending[request] = sequence
        hit = self.cache.lookup(*request, sequence.namespace, sequence.prefix)
        if not hit.pending:
            self.answered(request, hit)
        elif wait:
            self.answered(request, wait_lookup(self.cache, *request, sequence.namespace, sequence.prefix))

    @rule(
        pick=picks,
        owner=st.sampled_from(OWNERS),
        wait=st.sampled_from([True, True, False]),
        from_tiers=st.booleans(),
    )
    def lookup_known(self, pick: int, owner: str, wait: bool, from_tiers: bool) -> None:
        if from_tiers:
            self.empty_l1(settled=True)
        if self.known:
            self.lookup(self.known[pick % len(self.known)], owner, wait)

    @rule(drawn=sequences, owner=st.sampled_from(OWNERS), faults=st.sampled_from(FAULTS))
    def load_back(self, drawn: tuple[Namespace, list[int]], owner: str, faults: Faults) -> None:
        """All that a tier is for, at one go: chance alone rarely gets there."""
        self.tiers_recover()
        self.store(drawn)
        self.empty_l1(settled=True)
        if self.hostile:
            for tier in self.tiers:
                tier.faults = faults
        self.lookup(drawn, owner, wait=True)

    @rule(pick=picks, expire=st.booleans())
    def ask_again(self, pick: int, expire: bool) -> None:
        if not self.pending:
            return
        request = sorted(self.pending)[pick % len(self.pending)]
        sequence = self.pending[request]
        if expire and self.hostile:
            self.skipped_seconds += 100
        hit = self.cache.lookup(*request, sequence.namespace, sequence.prefix)
        assert not (expire and self.hostile and hit.pending)
        if not hit.pending:
            self.answered(request, hit)

    def answered(self, request: tuple[str, str], hit: Hit) -> None:
        sequence = self.pending.pop(request)
        assert hit.num_tokens == sum(piece.num_tokens for piece in hit.pieces) <= sequence.prefix.num_tokens
        assert (hit.miss_reason is None) == (hit.num_tokens == sequence.prefix.num_tokens)
        assert sum(hit.tokens_by_tier.values()) == hit.num_tokens
        copies = [
            payloads(self.cache, hit, shard, sequence.namespace)
            for shard in range(sequence.namespace.world_size)
        ]
        for shard, per_piece in enumerate(copies):
            for piece, content in zip(hit.pieces, per_piece, strict=True):
                key = sequence.namespace, piece.chunk_hash, shard
                assert content in self.committed.get(key, set()), "never committed under this key"
        self.check_reach(sequence, hit)
        if hit.num_tokens:
            self.leased[request] = Leased(sequence.namespace, hit, copies)
        assert self.cache.lookup(*request, sequence.namespace, sequence.prefix).num_tokens >= hit.num_tokens
        if not hit.num_tokens:
            self.cache.release(*request)

    def check_reach(self, sequence: Sequence, hit: Hit) -> None:
        """Overridden where it is known how far a hit must reach."""

    @rule(pick=picks)
    def release(self, pick: int) -> None:
        if not self.leased:
            return
        request = sorted(self.leased)[pick % len(self.leased)]
        self.check_leased(self.leased.pop(request))
        self.cache.release(*request)

    @rule(pick=picks)
    def give_up(self, pick: int) -> None:
        if not self.pending:
            return
        request = sorted(self.pending)[pick % len(self.pending)]
        del self.pending[request]
        self.cache.release(*request)

    # Other events

    @rule(owner=st.sampled_from(OWNERS))
    def drop_owner(self, owner: str) -> None:
        self.check_everything()
        self.cache.drop_owner(owner)
        self.reserved = [one for one in self.reserved if one.owner != owner]
        self.leased = {request: one for request, one in self.leased.items() if request[0] != owner}
        self.pending = {request: one for request, one in self.pending.items() if request[0] != owner}

    @rule(space=st.sampled_from([*SPACES, None]))
    def clear(self, space: Namespace | None) -> None:
        namespace = None if space is None else self.spaces[space]
        self.cache.clear(namespace)
        self.committed = {
            key: contents
            for key, contents in self.committed.items()
            if namespace is not None and key[0] is not namespace
        }
        for one in self.reserved:
            if namespace is None or one.namespace is namespace:
                one.is_dropped = True

    @rule(settled=st.sampled_from([True, True, False]))
    def empty_l1(self, settled: bool) -> None:
        """What the tiers hold is read again from now on."""
        if settled:
            settle(self.cache)
        self.was_emptied = True
        self.cache.clear(tiers=False)
        for one in self.reserved:
            one.is_dropped = True
        if not self.tiers:
            self.committed.clear()

    @precondition(lambda self: self.hostile and self.tiers)
    @rule(
        number=st.integers(0, 1),
        faults=st.sampled_from(FAULTS),
    )
    def tier_fails(self, number: int, faults: Faults) -> None:
        self.tiers[number % len(self.tiers)].faults = faults

    @precondition(lambda self: self.hostile and self.tiers)
    @rule()
    def tiers_recover(self) -> None:
        for tier in self.tiers:
            tier.faults = Faults()

    @rule()
    def settle(self) -> None:
        settle(self.cache)

    # What always holds

    def check_leased(self, leased: Leased) -> None:
        for shard, copies in enumerate(leased.copies):
            assert payloads(self.cache, leased.hit, shard, leased.namespace) == copies

    @invariant()
    def check_everything(self) -> None:
        if not hasattr(self, "cache"):
            return
        for one in self.reserved:
            for offset, content in one.contents.values():
                assert self.cache.pool[offset : offset + len(content)] == content
        for leased in self.leased.values():
            self.check_leased(leased)
        stats = self.cache.l1_stats()
        assert stats["lookups"] == len(self.leased) + len(self.pending)
        assert stats["reservations"] == sum(len(one.contents) for one in self.reserved)
        assert stats["used_bytes"] <= stats["budget_bytes"]
        self.check_overlaps()

    def check_overlaps(self) -> None:
        """What is reserved overlaps nothing; leased slots are whole and the same key's, or apart."""
        extents: dict[int, tuple[int, object]] = {}
        for number, one in enumerate(self.reserved):
            for chunk_hash, (offset, content) in one.contents.items():
                assert offset not in extents
                extents[offset] = offset + len(content), (number, chunk_hash, one.shard)
        for leased in self.leased.values():
            for shard, offsets in enumerate(leased.hit.offsets):
                for piece, offset in zip(leased.hit.pieces, offsets, strict=True):
                    extent = offset + LAYOUT.payload_bytes(piece.num_tokens), (-1, piece.chunk_hash, shard)
                    assert extents.setdefault(offset, extent) == extent
        ordered = sorted((start, end) for start, (end, _) in extents.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ordered))

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        with self.stack:
            for tier in self.tiers:
                tier.faults = Faults()
            for owner in OWNERS:
                self.cache.drop_owner(owner)
            settle(self.cache)
            with self.cache._lock:
                entries = list(self.cache.index.entries.values())
                for entry in entries:
                    assert entry.num_children == sum(other.parent == entry.key for other in entries)
            self.cache.clear()
            deadline = time.monotonic() + 20
            while self.cache.l1_stats()["used_bytes"] and time.monotonic() < deadline:
                time.sleep(0.001)
            stats = self.cache.l1_stats()
            for name, tiers in self.cache.metrics.totals().get("tier_frame_misses", {}).items():
                for reason in (reason for reason, count in tiers.items() if count):
                    event(f"{name} {reason}")
            if self.cache.metrics.totals()["hit_tokens"].get("tier0"):
                event("loaded from tier0")
            if self.cache.index.num_evicted:
                event("evicted")
            assert (stats["used_bytes"], stats["lookups"], stats["reservations"]) == (0, 0, 0)
            assert self.cache.index.allocator.num_slots == 0


class ExactCore(Core):
    """Room for everything and tiers that do as they are told: then it is known what every look-up finds."""

    pool_bytes = 4 << 20
    hostile = False

    def check_reach(self, sequence: Sequence, hit: Hit) -> None:
        if self.keep_in_l1 and not self.was_emptied:
            assert hit.num_tokens == self.longest(sequence)

    def longest(self, sequence: Sequence) -> int:
        """How far committed pieces reach along a sequence."""
        namespace, prefix = sequence.namespace, sequence.prefix

        def held(piece_hash: bytes) -> bool:
            return all(
                (namespace, piece_hash, shard) in self.committed for shard in range(namespace.world_size)
            )

        per_chunk = CHUNK_SIZE // BLOCK_SIZE
        block = 0
        while block % per_chunk == 0 and block < prefix.num_blocks:
            ends = range(min(block + per_chunk, prefix.num_blocks), block, -1)
            end = next((end for end in ends if held(prefix.block_hash(end - 1))), block)
            if end == block:
                break
            block = end
        if block == prefix.num_blocks and prefix.remainder_hash and held(prefix.remainder_hash):
            return prefix.num_tokens
        return block * BLOCK_SIZE


_settings = settings(
    max_examples=int(os.environ.get("KVSTRATA_TEST_EXAMPLES", "60")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestCore = Core.TestCase
TestCore.settings = _settings
TestExactCore = ExactCore.TestCase
TestExactCore.settings = _settings
