"""What is held: one page, one entry, and deleting."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from kvstrata.cache.cache import Cache
from kvstrata.cache.index import Entry, entry_key
from kvstrata.cache.io import TierIO
from kvstrata.errors import NotFoundError, OperationError, TierUnavailable
from kvstrata.metrics import L1
from kvstrata.operations.jobs import Job
from kvstrata.operations.report import Report
from kvstrata.operations.scope import Scope
from kvstrata.tiers.inspect import StoredFrame, inspect_frame
from kvstrata.types import Miss, ParsedKey, parse_key

STEP = 1000
"""Keys that are taken from a tier, or entries that are dropped from L1, in one go."""
LIST_SECONDS = 10.0
"""How long a page may take."""
READ_SECONDS = 30.0
"""How long one entry may take."""


@dataclass(frozen=True)
class EntryReport(Report):
    """One shard that a tier holds. What only L1 knows is null for other tiers."""

    key: str
    tier: str
    model_name: str
    shard: int
    first_token: int | None = None
    """Position of its first token in the sequence."""
    num_tokens: int | None = None
    payload_bytes: int | None = None
    state: str | None = None
    """"ready", "writing" or "loading"."""
    num_leases: int | None = None
    """How many look-ups, moves and pins hold it now."""
    num_children: int | None = None
    """Entries in L1 that continue it."""
    also_in: list[str] | None = None
    """Tiers that hold it too, as far as L1 knows; those with a write in progress included."""


@dataclass(frozen=True)
class EntryPage(Report):
    """A part of what a tier holds, in an order that does not change."""

    entries: list[EntryReport]
    next_after: str | None
    """Pass it as ``after`` for the next page; null on the last one."""


@dataclass(frozen=True)
class FrameReport(Report):
    """What a stored frame says of itself."""

    tier: str
    intact: bool
    """Whether its checksums are right."""
    frame_bytes: int
    fault: str | None = None
    """What is wrong with it."""
    first_token: int | None = None
    num_tokens: int | None = None
    payload_bytes: int | None = None
    codec: str | None = None
    dtype: str | None = None
    created_at: int | None = None
    """Unix seconds."""
    layout_fingerprint: str | None = None


@dataclass(frozen=True)
class EntryDetails(Report):
    """One entry in all tiers."""

    key: str
    l1: EntryReport | None
    """Null when L1 does not hold it."""
    frames: list[FrameReport]
    """One for each lower tier that holds it."""
    not_asked: list[str]
    """Tiers that did not answer, or are down or bypassed."""


@dataclass(frozen=True)
class Deleted(Report):
    """What a deletion did at once."""

    l1_entries: int
    """Entries dropped from L1."""
    queued_in: list[str]
    """Tiers that delete it after the writes that are queued."""
    not_asked: list[str]
    """Tiers that are down or bypassed, and keep what they hold."""


def parse(key: str) -> ParsedKey:
    """The parts of a readable key.

    Raises:
        OperationError: it is none.
    """
    try:
        parsed = parse_key(key)
    except ValueError:
        raise OperationError(f"not a key of kvstrata: {key[:200]!r}") from None
    if not 0 <= parsed.worker_id < 1 << 16:
        raise OperationError(f"not a key of kvstrata: worker id {parsed.worker_id}")
    return parsed


def readable_key(entry: Entry) -> str:
    return entry.namespace.key(entry.chunk_hash, entry.shard)


class Entries:
    """The entries of all tiers. Methods may take as long as a tier; call them on threads that may wait."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def tier(self, name: str) -> TierIO:
        """Raises NotFoundError, with the names that there are."""
        for tier in self._cache.tiers:
            if tier.name == name:
                return tier
        known = ", ".join([L1, *(tier.name for tier in self._cache.tiers)])
        raise NotFoundError(f"there is no tier {name!r}; there is {known}")

    def matching(self, scope: Scope) -> list[Entry]:
        """The entries of L1 that are in ``scope``."""
        matches = scope.entry_filter(self._cache.namespaces())
        with self._cache.guarded() as index:
            entries = list(index.entries.values())
        return [entry for entry in entries if matches(entry)]

    # One page

    def page(self, tier: str, scope: Scope, after: str, limit: int) -> EntryPage:
        """Up to ``limit`` entries of ``tier`` that are in ``scope`` and come after the key ``after``.

        With isolation, a scope without a salt is that of entries without one.

        Raises:
            NotFoundError: there is no such tier.
            OperationError: ``scope`` or ``after`` cannot be used for this tier.
            TierUnavailable: the tier does not answer, or has too many entries for the time; narrow the prefix.
        """
        if self._cache.isolated and scope.salt is None:
            scope = dataclasses.replace(scope, salt="")
        if tier == L1:
            return self._l1_page(scope, after, limit)
        if self._cache.isolated:
            raise OperationError(
                f"isolation is on, and keys of tier {tier} do not tell their salt: only l1 is listed"
            )
        return self._tier_page(self.tier(tier), scope, after, limit)

    def _l1_page(self, scope: Scope, after: str, limit: int) -> EntryPage:
        # By index key, which is a hash: readable keys of a million entries take seconds to make.
        start = b""
        if after:
            parsed = parse(after)
            start = entry_key(parsed.chunk_hash, parsed.worker_id)
        wanted = (entry for entry in self.matching(scope) if entry.key > start)
        found = heapq.nsmallest(limit + 1, wanted, key=lambda entry: entry.key)
        reports = [self._report(entry) for entry in found[:limit]]
        return EntryPage(reports, reports[-1].key if len(found) > limit else None)

    def _tier_page(self, tier: TierIO, scope: Scope, after: str, limit: int) -> EntryPage:
        deadline = time.monotonic() + LIST_SECONDS
        matches = scope.key_filter()
        smallest: list[str] = []
        for keys in scan(tier, scope.prefix, deadline):
            wanted = (key for key in keys if key > after and matches(key))
            smallest = heapq.nsmallest(limit + 1, itertools.chain(smallest, wanted))
        reports = []
        for key in smallest[:limit]:
            parsed = parse(key)
            reports.append(EntryReport(key, tier.name, parsed.model_name, parsed.worker_id))
        return EntryPage(reports, reports[-1].key if len(smallest) > limit else None)

    def _report(self, entry: Entry) -> EntryReport:
        return EntryReport(
            key=readable_key(entry),
            tier=L1,
            model_name=entry.namespace.model_name,
            shard=entry.shard,
            first_token=entry.first_token,
            num_tokens=entry.num_tokens,
            payload_bytes=entry.payload_bytes,
            state=entry.state.name.lower(),
            num_leases=entry.leases,
            num_children=entry.num_children,
            also_in=[tier.name for i, tier in enumerate(self._cache.tiers) if entry.tiers & (1 << i)],
        )

    # One entry

    def get(self, key: str) -> EntryDetails:
        """What all tiers know of ``key``. Reads the whole frame from each.

        Raises:
            NotFoundError: no tier holds it.
            OperationError: not a key.
        """
        held = self.find(key)
        frames, not_asked = [], []
        for tier in self._cache.tiers:
            try:
                found = tier.run(partial(inspect_frame, key=key), READ_SECONDS)
            except TierUnavailable:
                not_asked.append(tier.name)
                continue
            if not isinstance(found, Miss):
                frames.append(_report_frame(tier.name, found))
        if held is None and not frames and not not_asked:
            raise NotFoundError(f"no tier holds {key}")
        return EntryDetails(key, None if held is None else self._report(held), frames, not_asked)

    def find(self, key: str) -> Entry | None:
        """The entry of L1 with that readable key.

        Raises:
            OperationError: not a key.
        """
        parsed = parse(key)
        with self._cache.guarded() as index:
            entry = index.get(parsed.chunk_hash, parsed.worker_id)
        return entry if entry is not None and readable_key(entry) == key else None

    # Deleting

    def delete(self, keys: Iterable[str], tiers: Iterable[str] | None = None) -> Deleted:
        """Drop entries from L1 now, and from the other tiers after the writes that are queued.

        Raises:
            NotFoundError, OperationError: there is no such tier; not a key. Nothing was deleted.
        """
        keys = list(keys)
        held = [entry for key in keys if (entry := self.find(key)) is not None]
        names = {L1, *(tier.name for tier in self._cache.tiers)} if tiers is None else set(tiers)
        chosen = [self.tier(name) for name in sorted(names - {L1})]
        num_dropped = self._drop(held, names)
        asked = [tier for tier in chosen if tier.state == "up"]
        for tier in asked:
            tier.delete(keys)
        not_asked = [tier.name for tier in chosen if tier not in asked]
        return Deleted(num_dropped, [tier.name for tier in asked], not_asked)

    def _drop(self, entries: Iterable[Entry], tiers: set[str]) -> int:
        """Drop from L1 if that is meant, and note that the named tiers no longer hold them: that also calls off the
        writes that are planned."""
        kept_in = ~sum(1 << i for i, tier in enumerate(self._cache.tiers) if tier.name in tiers)
        num_dropped = 0
        with self._cache.guarded() as index:
            for entry in entries:
                if index.entries.get(entry.key) is not entry:
                    continue
                entry.tiers &= kept_in
                if L1 in tiers:
                    index.drop(entry)
                    num_dropped += 1
        return num_dropped

    def delete_scope(self, job: Job, scope: Scope, tiers: list[str]) -> None:
        """Delete all that is in ``scope`` from ``tiers``: the work of a job.

        What is stored or read meanwhile may stay. A tier that is down is waited for until the job is cancelled.
        """
        chosen = [self.tier(name) for name in tiers if name != L1]
        entries = self.matching(scope)
        known = [readable_key(entry) for entry in entries] if scope.salt is not None else []
        self._drop_scope(job, entries, set(tiers))
        job.result |= {tier.name: 0 for tier in chosen}
        if scope.salt is None:
            ended = [_clear(job, tier, scope) for tier in chosen]
        else:  # a key does not tell its salt: what L1 knew is all that can be found
            ended = [_delete(job, tier, known) for tier in chosen]
        for event in ended:
            job.wait(event)

    def clear(self, job: Job) -> None:
        """Drop everything from everywhere, also what is on its way to a tier or from it: the work of a job.

        Once begun it goes on when the job is cancelled. A tier that is down is waited for until then.
        """
        ended = {tier.name: threading.Event() for tier in self._cache.tiers}
        job.result |= {L1: 0} | dict.fromkeys(ended, 0)
        steps = self._cache.clearing(deleted=partial(_deleted, job), ended=lambda tier: ended[tier].set())
        for count in steps:
            _deleted(job, L1, count)
            time.sleep(0)
        for event in ended.values():
            job.wait(event)

    def _drop_scope(self, job: Job, entries: list[Entry], tiers: set[str]) -> None:
        dropped = 0
        for start in range(0, len(entries), STEP):
            count = self._drop(entries[start : start + STEP], tiers)
            dropped += count
            job.advance(count)
        if L1 in tiers:
            job.result[L1] = job.result.get(L1, 0) + dropped


def _report_frame(tier: str, found: StoredFrame) -> FrameReport:
    header = found.header
    if header is None:
        return FrameReport(tier, False, found.frame_bytes, found.fault)
    return FrameReport(
        tier=tier,
        intact=not found.fault,
        frame_bytes=found.frame_bytes,
        fault=found.fault or None,
        first_token=header.first_token,
        num_tokens=header.num_tokens,
        payload_bytes=header.payload_bytes,
        codec=header.codec,
        dtype=header.dtype,
        created_at=header.created_at,
        layout_fingerprint=header.layout_fingerprint.hex(),
    )


def _clear(job: Job, tier: TierIO, scope: Scope) -> threading.Event:
    """Begin to delete what is in ``scope``; the event is set when it is done."""
    ended = threading.Event()
    in_scope = scope.key_filter()

    def matches(key: str) -> bool:
        return not job.cancelled.is_set() and in_scope(key)

    tier.clear(scope.prefix, ended.set, matches=matches, deleted=partial(_deleted, job, tier.name))
    return ended


def _deleted(job: Job, tier: str, count: int) -> None:
    """A tier has deleted a part, on a thread of its own."""
    job.result[tier] += count
    job.num_done += count


def _delete(job: Job, tier: TierIO, keys: list[str]) -> threading.Event:
    """Begin to delete ``keys``; the event is set when it is done."""
    ended = threading.Event()

    def delete() -> int:
        starts = range(0, len(keys), STEP)
        return sum(tier.tier.delete(keys[at : at + STEP]) for at in starts if not job.cancelled.is_set())

    def deleted(count: int) -> None:
        job.result[tier.name] = count
        ended.set()

    tier.until_done("delete", delete, deleted)
    return ended


def scan(tier: TierIO, prefix: str, deadline: float | None = None) -> Iterator[list[str]]:
    """The keys of a tier in batches, each on the tier's own thread, so that requests come in between.

    Raises:
        TierUnavailable: it does not answer, or not by ``deadline`` (monotonic).
    """

    def left() -> float:
        return READ_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())

    iterator = tier.run(lambda scanned: scanned.scan(prefix), left())
    while keys := tier.run(lambda _: list(itertools.islice(iterator, STEP)), left()):
        yield keys
