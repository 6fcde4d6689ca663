"""What a client holds at its server, and must give back even when it could not say so at the time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvstrata.protocol import messages as m
from kvstrata.types import Hit

_MAX_OWED = 65_536
"""Bound of what waits to be said. While the server is away nothing new is held, so this is never reached."""


class Holdings:
    """Leases and reserved slots at one server, named by the id of its pool.

    A request may be carried out although its answer never came, and a release, commit or abort may find no
    connection. Without this their slots would be lost until the client ends. Pure state; one thread at a time.
    """

    def __init__(self) -> None:
        self.pool_id = ""
        self._leased: set[str] = set()
        self._pending: set[str] = set()
        self._reserved: set[tuple[int, bytes]] = set()
        self._owed: deque[m.Release | m.Abort] = deque(maxlen=_MAX_OWED)

    def greeted(self, pool_id: str) -> list[m.Release | m.Abort]:
        """A server let us in; what it has to be told first. A new server holds nothing of ours."""
        owed = list(self._owed) if pool_id == self.pool_id else []
        if pool_id != self.pool_id:
            self._leased.clear()
            self._pending.clear()
            self._reserved.clear()
        self._owed.clear()
        self.pool_id = pool_id
        return owed

    def owe(self, message: m.Release | m.Abort) -> None:
        """This could not be said."""
        if self.pool_id:
            self._owed.append(message)

    def looked_up(self, request_id: str, hit: Hit) -> None:
        """A lookup was answered."""
        self._pending.discard(request_id)
        if hit.pending:
            self._pending.add(request_id)
        elif hit.num_tokens:
            self._leased.add(request_id)

    def lookup_lost(self, request_id: str, *, asked: bool) -> None:
        """A lookup got no answer. Its lease is given back, unless an earlier answer is in use."""
        if (asked or request_id in self._pending) and request_id not in self._leased:
            self.owe(m.Release(request_id))
        self._pending.discard(request_id)

    def released(self, request_id: str) -> None:
        """A lookup has ended."""
        self._leased.discard(request_id)
        self._pending.discard(request_id)

    def reserved(self, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """Slots were reserved."""
        self._reserved.update((shard, chunk_hash) for chunk_hash in chunk_hashes)

    def reserve_lost(self, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """A reservation got no answer. It is given back, but not what an earlier one has in use."""
        unknown = tuple(h for h in chunk_hashes if (shard, h) not in self._reserved)
        if unknown:
            self.owe(m.Abort(shard, unknown))

    def ended(self, shard: int, chunk_hashes: Sequence[bytes]) -> None:
        """A reservation was committed or aborted."""
        self._reserved.difference_update((shard, chunk_hash) for chunk_hash in chunk_hashes)
