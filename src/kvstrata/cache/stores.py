"""Device -> L1: slots that owners fill, from their reservation to their commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstrata.cache.frames import Transfer, prepare
from kvstrata.cache.index import Entry, State, entry_key
from kvstrata.cache.l1 import L1
from kvstrata.cache.spans import StoreSpan, StoreSpans
from kvstrata.cache.writes import Writes
from kvstrata.frame import HEADER_BYTES
from kvstrata.metrics import Metrics
from kvstrata.tracing import Tracer
from kvstrata.types import Namespace, Piece, Slot

Job = Callable[[], None]
"""I/O to do once the lock is released."""


@dataclass(slots=True)
class _Reserved:
    """A slot that an owner is filling."""

    entry: Entry
    transfer: Transfer
    span: StoreSpan | None


class Stores:
    """Takes L1's lock itself, but for ``drop_owner`` and ``len``, which are called with it held."""

    def __init__(self, l1: L1, writes: Writes, metrics: Metrics, tracer: Tracer | None) -> None:
        self._l1 = l1
        self._index = l1.index
        self._writes = writes
        self._metrics = metrics
        self._tracer = tracer
        self._reserved: dict[tuple[str, bytes], _Reserved] = {}

    def __len__(self) -> int:
        """Slots that are being filled."""
        return len(self._reserved)

    def reserve(
        self,
        owner: str,
        namespace: Namespace,
        shard: int,
        pieces: Sequence[Piece],
        traceparents: Sequence[str],
    ) -> list[Slot | None]:
        """See ``Cache.reserve``."""
        slots: list[Slot | None] = []
        jobs: list[Job] = []
        tracer = self._tracer
        spans = None if tracer is None else StoreSpans(tracer, namespace, shard, traceparents)
        with self._l1.lock:
            held = []
            for position, piece in enumerate(pieces):
                key = entry_key(piece.chunk_hash, shard)
                entry = self._index.get(piece.chunk_hash, shard)
                if (owner, key) in self._reserved:
                    # Also when it was dropped since: its commit must not be taken for that of a new slot.
                    slots.append(None)
                elif entry is not None:
                    slots.append(None)
                    held.append(entry)
                    if entry.state is State.READY:
                        transfer = self._l1.transfer(entry, piece.tokens_hash)
                        jobs += self._writes.stored(entry, transfer, again=True)
                else:
                    slots.append(self._reserve_new(owner, namespace, shard, piece))
                    if spans is not None and slots[-1] is not None:
                        self._reserved[owner, key].span = spans.of(position)
            self._index.touch(held)
        for job in jobs:
            job()
        return slots

    def _reserve_new(self, owner: str, namespace: Namespace, shard: int, piece: Piece) -> Slot | None:
        entry = self._index.insert(namespace, piece, shard, State.WRITING)
        if entry is None:
            self._metrics.stores_dropped.inc()
            return None
        transfer = self._l1.transfer(entry, piece.tokens_hash)
        prepare(transfer)
        self._reserved[owner, entry.key] = _Reserved(entry, transfer, None)
        return Slot(entry.offset + HEADER_BYTES, entry.payload_bytes)

    def commit(self, owner: str, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """See ``Cache.commit``."""
        jobs: list[Job] = []
        with self._l1.lock:
            committed = []
            for chunk_hash in chunk_hashes:
                reserved = self._reserved.pop((owner, entry_key(chunk_hash, shard)), None)
                if reserved is None:
                    continue
                entry, span = reserved.entry, reserved.span
                if entry.state is State.WRITING:
                    entry.state = State.READY
                    committed.append(entry)
                    jobs += self._writes.stored(entry, reserved.transfer, span=span)
                if span is not None:
                    span.ended(entry)
                self._l1.unlease(entry)
            self._index.touch(committed)
            self._metrics.stored(
                sum(e.num_tokens for e in committed), sum(e.payload_bytes for e in committed)
            )
        for job in jobs:
            job()

    def abort(self, owner: str, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """See ``Cache.abort``."""
        with self._l1.lock:
            for chunk_hash in chunk_hashes:
                self._abort(owner, entry_key(chunk_hash, shard))

    def drop_owner(self, owner: str) -> None:
        """Give back all that an owner reserved."""
        for _, key in [key for key in self._reserved if key[0] == owner]:
            self._abort(owner, key)

    def _abort(self, owner: str, key: bytes) -> None:
        reserved = self._reserved.pop((owner, key), None)
        if reserved is None:
            return
        entry = reserved.entry
        if entry.state is State.WRITING:
            self._index.drop(entry)
        if reserved.span is not None:
            reserved.span.ended(entry)
        self._index.unlease(entry)

    def payload(self, owner: str, shard: int, chunk_hash: bytes) -> memoryview | None:
        """See ``Cache.reserved_payload``."""
        with self._l1.lock:
            reserved = self._reserved.get((owner, entry_key(chunk_hash, shard)))
            return None if reserved is None else reserved.transfer.payload
