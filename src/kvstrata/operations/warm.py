"""Warming: L2 -> L1 because an operator wants it, not because a request waits for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from kvstrata.cache.cache import Cache
from kvstrata.cache.frames import Transfer, transfer_of
from kvstrata.cache.index import Entry, State
from kvstrata.cache.io import TierIO
from kvstrata.errors import OperationError, TierUnavailable
from kvstrata.operations.entries import READ_SECONDS, Entries, parse
from kvstrata.operations.jobs import Job
from kvstrata.operations.prompts import Prompts, hash_tokens
from kvstrata.tiers.inspect import inspect_frame
from kvstrata.types import Miss, Namespace, Piece


class Warming:
    """Brings entries of lower tiers into L1. All of it is work of jobs.

    L1 makes room as it does for requests, so what was used least goes; a job never loads more than L1's budget.
    Figures of a job: ``loaded``, ``already_in_l1``, ``not_held``, ``failed``, ``no_room``.
    """

    def __init__(self, cache: Cache, entries: Entries, prompts: Prompts) -> None:
        self._cache = cache
        self._entries = entries
        self._prompts = prompts

    def warm_prompts(
        self, job: Job, namespaces: Sequence[Namespace], prompts: Sequence[Sequence[int]], salt: str
    ) -> None:
        """Bring what the tiers hold of these token lists."""
        _begin(job, None)
        for tokens in prompts:
            missing = [self._warm_prompt(job, namespace, tokens, salt) for namespace in namespaces]
            num_missing, outcome = min(missing)  # a prompt is one model's; others need not have it
            job.result[outcome] += num_missing

    def _warm_prompt(
        self, job: Job, namespace: Namespace, tokens: Sequence[int], salt: str
    ) -> tuple[int, str]:
        """Bring what there is; how many entries there are not, and whether they are held nowhere for sure.

        Those of whole chunks count: not every engine stores what is behind the last of them.
        """
        job.check()
        held = self._prompts.locate(namespace, hash_tokens(namespace, tokens, salt))
        job.result["already_in_l1"] += len(held.l1_pieces) * namespace.world_size
        for piece in held.cover:
            for shard in range(namespace.world_size):
                key = namespace.key(piece.chunk_hash, shard)
                sources = [name for name, keys in held.keys.items() if key in keys]
                self._load(job, namespace, piece, shard, sources)
        num_missing = len(tokens) // namespace.chunk_size - held.num_tokens // namespace.chunk_size
        all_answered = len(held.keys) == len(self._cache.tiers)
        return num_missing * namespace.world_size, "not_held" if all_answered else "failed"

    def warm_keys(self, job: Job, namespaces: Sequence[Namespace], keys: Sequence[str]) -> None:
        """Bring entries by their keys. Each is read twice: first to learn what it is.

        Raises:
            OperationError: a key does not tell which one of ``namespaces`` it is of.
        """
        _begin(job, len(keys))
        for key in keys:
            if self._entries.find(key) is not None:
                job.result["already_in_l1"] += 1
                job.advance()
                continue
            for tier in self._cache.tiers:
                found = self._identify(tier, namespaces, key)
                if found is not None:
                    self._load(job, *found, parse(key).worker_id, [tier.name])
                    break
            else:
                job.result["not_held"] += 1
                job.advance()

    def _identify(
        self, tier: TierIO, namespaces: Sequence[Namespace], key: str
    ) -> tuple[Namespace, Piece] | None:
        """What an intact frame is, when an engine here can use it."""
        try:
            frame = tier.run(partial(inspect_frame, key=key), READ_SECONDS)
        except TierUnavailable:
            return None
        if isinstance(frame, Miss) or frame.header is None or frame.fault:
            return None
        header = frame.header
        found = [
            namespace
            for namespace in namespaces
            if namespace.layout.fingerprint == header.layout_fingerprint
            and key == namespace.key(header.chunk_hash, header.shard)
        ]
        if len(found) > 1:
            # In L1 under the wrong one, it would keep the right one's from being loaded or stored.
            raise OperationError(f"{len(found)} namespaces have keys like {key}; name one (GET /namespaces)")
        # Its parent is not written in it. That costs it the protection that a continued prefix has.
        piece = Piece(header.chunk_hash, b"", header.first_token, header.num_tokens, header.tokens_hash)
        return (found[0], piece) if found else None

    def _load(self, job: Job, namespace: Namespace, piece: Piece, shard: int, sources: Sequence[str]) -> None:
        """Read one shard from the first of ``sources`` into a slot of its own."""
        with self._cache.guarded() as index:
            # What was cleared must not come back.
            sources = [name for name in sources if not self._cache.is_being_cleared(name, namespace)]
            entry = None
            if index.get(piece.chunk_hash, shard) is not None:
                outcome = "already_in_l1"
            elif job.result["loaded_bytes"] + namespace.layout.payload_bytes(piece.num_tokens) > (
                index.allocator.budget_bytes
            ):
                raise OperationError(
                    "as much as L1's budget was loaded; more would evict what was loaded first"
                )
            elif not sources:
                outcome = "not_held"
            else:
                entry = index.insert(namespace, piece, shard, State.LOADING)
                outcome = "no_room"
        if entry is not None:
            outcome = self._read(entry, piece, self._entries.tier(sources[0]))
        job.result[outcome] += 1
        if outcome == "loaded" and entry is not None:
            job.result["loaded_bytes"] += entry.payload_bytes
        job.advance()

    def _read(self, entry: Entry, piece: Piece, tier: TierIO) -> str:
        transfer = transfer_of(self._cache.pool, entry, piece.tokens_hash, 0)
        ended = threading.Event()
        outcomes: list[Miss | None] = []

        def done(_: Sequence[Transfer], outcome: Sequence[Miss | None]) -> None:
            outcomes.extend(outcome)
            held_by = tier if outcome[0] is None else None
            self._settle(entry, held_by)
            ended.set()

        tier.read([transfer], done, lambda *_: None)
        # The slot is given back by ``done``, however late that is.
        if not ended.wait(READ_SECONDS):
            return "failed"
        miss = outcomes[0]
        if miss is None:
            return "loaded"
        return "not_held" if miss.reason == "absent" else "failed"

    def _settle(self, entry: Entry, held_by: TierIO | None) -> None:
        """The read has ended; or there was none."""
        with self._cache.guarded() as index:
            if entry.state is State.LOADING:
                if held_by is None:
                    index.drop(entry)
                else:
                    entry.state = State.READY
                    entry.tiers |= 1 << list(self._cache.tiers).index(held_by)
            index.unlease(entry)


def _begin(job: Job, num_total: int | None) -> None:
    job.num_total = num_total
    for name in ("loaded", "loaded_bytes", "already_in_l1", "not_held", "failed", "no_room"):
        job.result[name] = 0
