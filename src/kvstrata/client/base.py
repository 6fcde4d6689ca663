"""The verbs by which an inference engine, a tool or a Python program uses the cache.

``LocalClient`` holds the core itself; ``RemoteClient`` talks to a server over ZMQ and maps its pool. Both
behave the same, and the shipped client contract runs on both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from kvstrata.types import Hit, Namespace, Piece, Prefix, Slot


class Reservation:
    """Slots that a worker fills: ``buffers[i]`` is the payload of ``pieces[i]``, or None where nothing is to
    be copied (already held, or no room). End it with ``commit`` or ``abort`` of the client that made it."""

    __slots__ = ("buffers", "namespace", "pieces", "pool_id", "shard", "slots")

    def __init__(
        self,
        namespace: Namespace,
        shard: int,
        pieces: Sequence[Piece],
        slots: Sequence[Slot | None],
        buffers: Sequence[memoryview | None],
        pool_id: str,
    ) -> None:
        self.namespace = namespace
        self.shard = shard
        self.pieces = pieces
        self.slots = slots
        self.buffers = buffers
        self.pool_id = pool_id

    @property
    def reserved_hashes(self) -> tuple[bytes, ...]:
        """The chunk hashes of the pieces that have a slot."""
        return tuple(
            piece.chunk_hash for piece, slot in zip(self.pieces, self.slots, strict=True) if slot is not None
        )

    def end(self) -> tuple[bytes, ...]:
        """``reserved_hashes``, the first time; afterwards none: a reservation ends once. For clients."""
        hashes = self.reserved_hashes
        self.slots = [None] * len(self.slots)
        return hashes

    @property
    def num_tokens(self) -> int:
        """Tokens that are to be copied."""
        return sum(p.num_tokens for p, b in zip(self.pieces, self.buffers, strict=True) if b is not None)


class Client(ABC):
    """One user of the cache.

    Threading: one thread at a time per instance.
    Never in the way: no verb raises because a server is slow, gone or restarted, and none waits longer than
    ``timeout_seconds`` for it. A lookup is then no hit, a reservation empty, a load None; each is counted, and
    the client is back by itself when the server is.
    """

    @property
    @abstractmethod
    def connected(self) -> bool:
        """Whether the last exchange succeeded. Cheap; polls for a server that came back, without waiting."""

    @property
    @abstractmethod
    def server_id(self) -> str:
        """Which server this is connected to: another one after a restart. Empty while not connected; cheap."""

    @property
    @abstractmethod
    def server_chunk_size(self) -> int | None:
        """The chunk size that the server was told to use, if any. None while not connected."""

    @abstractmethod
    def lookup(
        self,
        request_id: str,
        namespace: Namespace,
        prefix: Prefix,
        first_token: int = 0,
        *,
        traceparent: str = "",
    ) -> Hit:
        """How many leading tokens of ``prefix`` are held, by all shards; leases them for ``request_id``.

        Who has the tokens before ``first_token`` already says so: nothing is read from lower tiers for them. Where
        L1 lacks them the hit's pieces begin with the chunk that has ``first_token`` (none, unless that is held).

        A pending answer means that lower tiers are being asked or read: call again with the same arguments.
        Once the answer is not pending it does not change until ``release``, and its slots stay.
        ``traceparent`` is the trace that the look-up belongs to, if it is traced.
        """

    @abstractmethod
    def release(self, request_id: str) -> None:
        """End the lease of ``request_id``. Nobody reads its payloads any more. Does not wait."""

    @abstractmethod
    def payloads(
        self, request_id: str, shard: int, hit: Hit, namespace: Namespace
    ) -> list[memoryview] | None:
        """The payloads of a hit for one shard, in the order of ``hit.pieces``; read-only by agreement.

        Mapped memory where the pool can be mapped (valid until ``release``), copies otherwise.
        None when they cannot be had (any more).
        """

    @abstractmethod
    def reserve(
        self,
        namespace: Namespace,
        shard: int,
        pieces: Sequence[Piece],
        *,
        traceparents: Sequence[str] = (),
    ) -> Reservation:
        """Reserve slots for the payloads of ``pieces``. Those already held need none.

        ``traceparents`` are the traces that the pieces belong to, one each, or empty.
        """

    @abstractmethod
    def commit(self, reservation: Reservation) -> None:
        """The buffers are filled: make them visible. Does not wait."""

    @abstractmethod
    def abort(self, reservation: Reservation) -> None:
        """Give the slots of a reservation back. Does not wait."""

    @abstractmethod
    def report_prefill(self, namespace: Namespace, num_tokens: int, seconds: float) -> None:
        """Tell the gate how long computing ``num_tokens`` prompt tokens took. Does not wait."""

    @abstractmethod
    def report_move(self, num_bytes: int, seconds: float, *, is_store: bool) -> None:
        """Tell the metrics of a copy from a device to L1 (``is_store``) or back. Does not wait."""

    @abstractmethod
    def clear(self, namespace: Namespace | None = None, *, tiers: bool = True) -> int | None:
        """Drop everything of a namespace, or all, from L1 now and from the tiers in the background.

        With ``tiers`` false only L1 is emptied; what the tiers hold stays, and is read again when asked for.

        Returns the number of L1 entries dropped; None when nobody has said that it is done, which it may be or
        not: who must not see what was stored before asks again. Until a tier is cleared it answers no look-up;
        of a server that ends before that nobody knows what its tiers hold (``server_id`` is another one then).
        """

    @abstractmethod
    def keys(self, prefix: str = "", limit: int = 1000) -> list[str]:
        """Readable keys held in L1 that begin with ``prefix``, at most ``limit``."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """A snapshot of counters and sizes, as the HTTP API shows it. Empty when no server answers."""

    @abstractmethod
    def mapped_pool(self, pool_id: str) -> memoryview | None:
        """The whole pool of that id as mapped here, to register it with a device; None when not mapped."""

    @abstractmethod
    def close(self) -> None:
        """Release all leases, unmap, disconnect. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
