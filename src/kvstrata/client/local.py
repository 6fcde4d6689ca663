"""In-process mode: the client that holds the core itself."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from kvstrata.cache.build import build_cache
from kvstrata.cache.cache import Cache
from kvstrata.client.base import Client, Reservation
from kvstrata.config import Settings
from kvstrata.memory.region import SharedRegion
from kvstrata.metrics import Metrics
from kvstrata.tracing import Tracer, open_tracer
from kvstrata.types import NO_HIT, Hit, Namespace, Piece, Prefix

_POLL_SECONDS = 0.0005


class LocalClient(Client):
    """A client with a core of its own. Unlike its base class demands, it may be used by several threads."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Build the core.

        Raises:
            ConfigError: a setting is wrong.
            PluginError: a library is missing; the message names the extra.
            PoolError: there is not enough memory for the pool.
        """
        settings = settings or Settings()
        self._chunk_size = settings.chunk_size
        self._region = SharedRegion.create(settings.max_local_cpu_bytes, settings.shm_dir)
        self._tracer: Tracer | None = None
        try:
            self._tracer = open_tracer("local", enabled=settings.tracing)
            self.cache: Cache = build_cache(settings, self._region, Metrics(), self._tracer)
        except BaseException:
            self._close_rest()
            raise
        self._owner = f"local-{uuid.uuid4().hex[:8]}"
        self._closed = False

    @property
    def connected(self) -> bool:
        return not self._closed

    @property
    def server_id(self) -> str:
        return "" if self._closed else self.cache.pool_id

    @property
    def server_chunk_size(self) -> int | None:
        return self._chunk_size

    def lookup(
        self,
        request_id: str,
        namespace: Namespace,
        prefix: Prefix,
        first_token: int = 0,
        *,
        traceparent: str = "",
    ) -> Hit:
        if self._closed:
            return NO_HIT
        interned = self.cache.intern(namespace)
        return self.cache.lookup(self._owner, request_id, interned, prefix, first_token, traceparent)

    def wait_lookup(self, request_id: str, namespace: Namespace, prefix: Prefix) -> Hit:
        """Look up and wait until the answer is no longer pending; at most the look-up's deadline."""
        while (hit := self.lookup(request_id, namespace, prefix)).pending:
            time.sleep(_POLL_SECONDS)
        return hit

    def release(self, request_id: str) -> None:
        self.cache.release(self._owner, request_id)

    def payloads(
        self, request_id: str, shard: int, hit: Hit, namespace: Namespace
    ) -> list[memoryview] | None:
        del namespace  # the core knows it
        if self._closed or not hit.pieces:
            return None if hit.pieces else []
        hashes = [piece.chunk_hash for piece in hit.pieces]
        return self.cache.leased_payloads(self._owner, request_id, shard, hashes)

    def reserve(
        self,
        namespace: Namespace,
        shard: int,
        pieces: Sequence[Piece],
        *,
        traceparents: Sequence[str] = (),
    ) -> Reservation:
        if self._closed:
            return Reservation(namespace, shard, pieces, [None] * len(pieces), [None] * len(pieces), "")
        interned = self.cache.intern(namespace)
        slots = self.cache.reserve(self._owner, interned, shard, pieces, traceparents)
        buffers = [
            None if slot is None else self.cache.pool[slot.offset : slot.offset + slot.payload_bytes]
            for slot in slots
        ]
        return Reservation(namespace, shard, pieces, slots, buffers, self.cache.pool_id)

    def commit(self, reservation: Reservation) -> None:
        self.cache.commit(self._owner, reservation.shard, reservation.end())

    def abort(self, reservation: Reservation) -> None:
        self.cache.abort(self._owner, reservation.shard, reservation.end())

    def report_prefill(self, namespace: Namespace, num_tokens: int, seconds: float) -> None:
        self.cache.report_prefill(self.cache.intern(namespace), num_tokens, seconds)

    def report_move(self, num_bytes: int, seconds: float, *, is_store: bool) -> None:
        self.cache.metrics.device_moved(num_bytes, seconds, is_store=is_store)

    def clear(self, namespace: Namespace | None = None, *, tiers: bool = True) -> int | None:
        if self._closed:
            return None
        return self.cache.clear(None if namespace is None else self.cache.intern(namespace), tiers=tiers)

    def keys(self, prefix: str = "", limit: int = 1000) -> list[str]:
        return [] if self._closed else self.cache.keys(prefix, limit)

    def stats(self) -> dict[str, Any]:
        return {} if self._closed else self.cache.stats()

    def mapped_pool(self, pool_id: str) -> memoryview | None:
        return self.cache.pool if pool_id == self.cache.pool_id and not self._closed else None

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.cache.drop_owner(self._owner)
            self.cache.close()
            self._close_rest()

    def _close_rest(self) -> None:
        self._region.close()
        if self._tracer is not None:
            self._tracer.close()
