"""What travels between the scheduler's connector and the workers' connectors, by vLLM's own means."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstrata.types import Hit, KVLayout, Namespace, Piece


@dataclass(frozen=True)
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Worker -> scheduler, once at start."""

    layout: KVLayout | None
    refusal: str = ""
    """Why this worker cannot store or load; empty when it can."""


@dataclass(frozen=True)
class LoadOp:
    """Scheduler -> workers: bring a part of a hit into the request's blocks."""

    request_id: str
    lease_id: str
    hit: Hit
    first_token: int
    """Where loading begins: what lies before is in vLLM's own cache. A block boundary."""
    end_token: int
    """Where loading ends. The last block is copied whole."""
    block_ids: tuple[int, ...]
    """The request's blocks from ``first_token`` to ``end_token``."""
    traceparent: str = ""
    """The request's trace; empty while it is not traced."""


@dataclass(frozen=True)
class StoreOp:
    """Scheduler -> workers: store these pieces after this step's forward pass."""

    request_id: str
    pieces: tuple[Piece, ...]
    first_block: int
    """Position in the sequence of the first block in ``block_ids``."""
    block_ids: tuple[int, ...]
    traceparent: str = ""


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler -> workers, every step."""

    namespace: Namespace | None = None
    """Set when there is something to load or to store."""
    loads: tuple[LoadOp, ...] = ()
    stores: tuple[StoreOp, ...] = ()
    prefill_tokens: int = 0
    """Prompt tokens that this step computes, when it computes nothing else."""
    number: int = 0
    """Counts the steps, from 1."""


@dataclass(frozen=True)
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Worker -> scheduler: what has come about by the end of a step."""

    step: int
    """Its number: whatever it and those before it stored is stored."""
    ended: dict[str, int] = field(default_factory=dict)
    """Loads that ended, by lease id, with the number of workers that say so."""
    failed: frozenset[str] = frozenset()
    """Lease ids of loads that failed on a worker at least."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """The report of both workers together."""
        if not isinstance(other, WorkerReport):
            raise TypeError(f"not a report of this connector: {type(other).__name__}")
        ended = dict(self.ended)
        for lease_id, count in other.ended.items():
            ended[lease_id] = ended.get(lease_id, 0) + count
        return WorkerReport(min(self.step, other.step), ended, self.failed | other.failed)
