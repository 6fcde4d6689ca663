"""The worker's half of the connector: copies pages between the engine's KV tensors and the cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvstrata.client.base import Client, Reservation
from kvstrata.device.copy import PageCopier, make_copier
from kvstrata.device.layout import find_pages
from kvstrata.device.unpack import PageReader
from kvstrata.integrations.vllm.metadata import LoadOp, StepMetadata, StoreOp, WorkerReport
from kvstrata.integrations.vllm.moves import Moves
from kvstrata.tracing import Attributes, Span, Tracer
from kvstrata.types import KVLayout, Namespace, Piece

logger = logging.getLogger(__name__)

_MIN_MEASURED_TOKENS = 64
"""Steps with fewer prompt tokens say more about their fixed costs than about the speed of prefill."""


@dataclass
class _Step:
    """What happens in the step under way."""

    metadata: StepMetadata
    began_at: float
    load_seconds: float = 0.0
    failed_blocks: set[int] = field(default_factory=set)
    failed_leases: set[str] = field(default_factory=set)


class WorkerSide:
    """Lives in a worker process; called by it from one thread.

    Args:
        client: this process' client.
        shard: which shard of a chunk this worker loads.
        stores: whether it stores that shard (of ranks with the same KV one does).
        first: whether it is the worker that writes the log lines and reports timings.
        tracer: None while tracing is off.
    """

    def __init__(
        self, client: Client, *, shard: int, stores: bool, first: bool, tracer: Tracer | None = None
    ) -> None:
        self._client = client
        self._tracer = tracer
        self._shard = shard
        self._stores = stores
        self._first = first
        self._copier: PageCopier | None = None
        self._block_size = 0
        self._step: _Step | None = None
        self._finished: set[str] = set()
        self._running: list[tuple[Callable[[], bool], str]] = []
        self._pools: set[str] = set()
        self._moves = Moves()

    def register(
        self,
        kv_caches: Mapping[str, torch.Tensor],
        *,
        num_blocks: int,
        block_size: int,
        kernel: str,
        reader: PageReader | str,
    ) -> KVLayout:
        """Take the KV tensors.

        Raises:
            LayoutError: they cannot be copied.
        """
        pages = find_pages(
            kv_caches, num_blocks=num_blocks, block_size=block_size, kernel=kernel, reader=reader
        )
        self._copier = make_copier(pages)
        self._block_size = block_size
        return pages.layout

    def begin_step(self, metadata: StepMetadata) -> None:
        """vLLM is about to run a step."""
        self._client.connected  # noqa: B018 (polls for a server that came back, before it is needed)
        self._step = _Step(metadata, time.perf_counter())

    def end_step(self) -> None:
        """vLLM is done with the step."""
        self._step = None

    def load(self) -> None:
        """Copy hits from the cache into their requests' blocks.

        The requests are not part of this step. On a device, whatever uses the blocks is ordered behind the
        copies; that is why they count as ended here already.
        """
        step, copier = self._step, self._copier
        if step is None or copier is None or not step.metadata.loads or step.metadata.namespace is None:
            return
        start = time.perf_counter()
        for op in step.metadata.loads:
            op_start = time.perf_counter()
            span = self._begin("kvstrata.retrieve", op, op.end_token - op.first_token)
            loaded = self._try_load(copier, op, step.metadata.namespace)
            if span is not None:
                span.end(error="" if loaded else "it could not be loaded")
            if loaded:
                num_tokens, seconds = op.end_token - op.first_token, time.perf_counter() - op_start
                self._moved(step.metadata.namespace, num_tokens, seconds, is_store=False)
                if self._first:
                    logger.info("Retrieved %d tokens in %.4f seconds", num_tokens, seconds)
            else:
                self._moves.failed_loads += 1
                step.failed_leases.add(op.lease_id)
                step.failed_blocks.update(op.block_ids)
                logger.warning(
                    "Request %s: %d cached tokens could not be loaded and are recomputed",
                    op.request_id,
                    op.end_token - op.first_token,
                )
            self._finished.add(op.request_id)
        copies_done = copier.ticket()
        self._running += [(copies_done, op.lease_id) for op in step.metadata.loads]
        step.load_seconds = time.perf_counter() - start

    def _begin(self, name: str, op: LoadOp | StoreOp, num_tokens: int) -> Span | None:
        """A span of one request's copies; None while tracing is off. On a device it ends when they were begun."""
        if self._tracer is None:
            return None
        about: Attributes = {
            "kvstrata.request.id": op.request_id,
            "kvstrata.shard": self._shard,
            "kvstrata.tokens": num_tokens,
        }
        return self._tracer.begin(name, about, parent=op.traceparent)

    def _try_load(self, copier: PageCopier, op: LoadOp, namespace: Namespace) -> bool:
        try:
            return self._load_one(copier, op, namespace)
        except Exception:
            # The request is served all the same: vLLM computes blocks that are reported as failed.
            logger.exception("Request %s: loading failed", op.request_id)
            return False

    def _load_one(self, copier: PageCopier, op: LoadOp, namespace: Namespace) -> bool:
        payloads = self._client.payloads(op.lease_id, self._shard, op.hit, namespace)
        if payloads is None:
            return False
        self._register_pool(copier, op.hit.pool_id)
        first_block = op.first_token // self._block_size
        for piece, payload in zip(op.hit.pieces, payloads, strict=True):
            piece_block = piece.first_token // self._block_size
            piece_end = piece_block + namespace.layout.num_blocks(piece.num_tokens)
            # Blocks before first_block are vLLM's own and may be shared: they are not to be written.
            start = max(piece_block, first_block)
            end = min(piece_end, first_block + len(op.block_ids))
            if start < end:
                block_ids = op.block_ids[start - first_block : end - first_block]
                copier.load(payload, start - piece_block, block_ids)
        return True

    def _register_pool(self, copier: PageCopier, pool_id: str) -> None:
        if pool_id in self._pools:
            return
        self._pools.add(pool_id)
        pool = self._client.mapped_pool(pool_id)
        if pool is not None:
            copier.register(pool_id, pool)

    def store(self) -> None:
        """Copy what the step computed into the cache. The source blocks are free to change afterwards."""
        step, copier = self._step, self._copier
        if step is None or copier is None or step.metadata.namespace is None:
            return
        namespace, ops = step.metadata.namespace, step.metadata.stores
        self._report_prefill(step, namespace)
        if not ops or not self._stores:
            return
        start = time.perf_counter()
        pieces = [piece for op in ops for piece in op.pieces]
        spans = self._begin_stores(ops)
        parents = [span.traceparent for op, span in zip(ops, spans, strict=False) for _ in op.pieces]
        reservation = self._client.reserve(namespace, self._shard, pieces, traceparents=parents)
        try:
            self._register_pool(copier, reservation.pool_id)
            stored = self._copy_out(copier, ops, reservation)
            copier.wait()
        except Exception:
            # A store that is lost is a later miss; the step's results are right.
            logger.exception("Storing %d pieces failed", len(pieces))
            self._client.abort(reservation)
            for span in spans:
                span.end(error="storing failed")
            return
        self._client.commit(reservation)
        for span in spans:
            span.end()
        seconds = time.perf_counter() - start
        if stored:
            self._moved(namespace, stored, seconds, is_store=True)
        if stored and self._first:
            logger.info("Stored %d tokens in %.4f seconds", stored, seconds)

    def _begin_stores(self, ops: Sequence[StoreOp]) -> list[Span]:
        """A span for each; none while tracing is off."""
        begun = (self._begin("kvstrata.store", op, sum(p.num_tokens for p in op.pieces)) for op in ops)
        return [span for span in begun if span is not None]

    def _moved(self, namespace: Namespace, num_tokens: int, seconds: float, *, is_store: bool) -> None:
        """A copy has ended, or on a device was begun."""
        num_bytes = namespace.layout.payload_bytes(num_tokens)
        self._moves.add(num_tokens, num_bytes, seconds, is_store=is_store)
        self._client.report_move(num_bytes, seconds, is_store=is_store)

    def take_moves(self) -> Moves | None:
        """What was copied since the last call; None for nothing."""
        moves, self._moves = self._moves, Moves()
        return None if moves == Moves() else moves

    def _copy_out(self, copier: PageCopier, ops: Sequence[StoreOp], reservation: Reservation) -> int:
        num_tokens = 0
        buffers: Iterator[memoryview | None] = iter(reservation.buffers)
        for op in ops:
            for piece in op.pieces:
                buffer = next(buffers)
                if buffer is not None:
                    copier.store(self._blocks_of(op, piece), buffer)
                    num_tokens += piece.num_tokens
        return num_tokens

    def _blocks_of(self, op: StoreOp, piece: Piece) -> Sequence[int]:
        first = piece.first_token // self._block_size - op.first_block
        return op.block_ids[first : first - (-piece.num_tokens // self._block_size)]

    def _report_prefill(self, step: _Step, namespace: Namespace) -> None:
        copier = self._copier
        if not self._first or copier is None or not copier.is_synchronous:
            return
        num_tokens = step.metadata.prefill_tokens
        if num_tokens > _MIN_MEASURED_TOKENS:
            seconds = time.perf_counter() - step.began_at - step.load_seconds
            self._client.report_prefill(namespace, num_tokens, seconds)

    def take_finished(self) -> set[str]:
        """Requests whose loads have ended since the last call, failed ones included."""
        finished, self._finished = self._finished, set()
        return finished

    def take_failed_blocks(self) -> set[int]:
        """Blocks that this step was to load and did not."""
        if self._step is None:
            return set()
        failed, self._step.failed_blocks = self._step.failed_blocks, set()
        return failed

    def take_report(self) -> WorkerReport | None:
        """What the scheduler's connector is to know."""
        if self._step is None:
            return None
        ended = [lease_id for done, lease_id in self._running if done()]
        self._running = [(done, lease_id) for done, lease_id in self._running if lease_id not in ended]
        failed = frozenset(self._step.failed_leases)
        return WorkerReport(self._step.metadata.number, dict.fromkeys(ended, 1), failed)

    def close(self) -> None:
        """Disconnect."""
        if self._tracer is not None:
            self._tracer.close()  # first: whoever ends this process does not wait for long
        self._client.close()
