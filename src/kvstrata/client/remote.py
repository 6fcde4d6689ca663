"""The client of a server: control over ZMQ, data through the mapped pool."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvstrata.client.base import Client, Reservation
from kvstrata.client.channel import Answer, Channel
from kvstrata.client.holdings import Holdings
from kvstrata.client.mapping import PoolMappings
from kvstrata.protocol import messages as m
from kvstrata.types import NO_HIT, PENDING, Hit, Namespace, Piece, Prefix

logger = logging.getLogger(__name__)

_PART_HASHES = 1024
"""Chunks of one commit or fetch: each may come with its payload, and a message has a bounded number of parts."""
_PART_BYTES = 64 << 20
"""Of one fetch, about: each has the time of a request, and meanwhile the server answers nobody else."""
_RETRY_SECONDS = 1.0
"""Pause between attempts to greet a server, or to have it restarted, on one connection."""
_OFTEN_SECONDS = 60.0
_AWAY_TIMEOUTS = 10.0
"""A server that lets a request wait for its deadline twice within so long is left alone for so many deadlines: one
that was slow again and again held up all requests of an engine for 60 % of the time."""
_WAIT_PAUSE_SECONDS = 10.0
"""After a load waited for the server in vain, others do not wait: those of one step would add their waits up."""


class RemoteClient(Client):
    """A client of the server at an endpoint. One thread at a time."""

    def __init__(
        self,
        endpoint: str,
        name: str,
        *,
        timeout_seconds: float = 1.0,
        map_pool: bool = True,
        keep_alive: Callable[[], None] | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Connect in the background; never raises because nobody is there.

        Args:
            endpoint: "tcp://host:port" or "ipc://path".
            name: who we are, for the server's log.
            timeout_seconds: deadline of one request.
            map_pool: whether this client copies payloads. One that does not still holds the pool's connection,
                by which the server sees its end.
            keep_alive: called while the server is away, at most once a second; embedded mode restarts it.
            on_close: called at the end of ``close``; embedded mode ends the server.
        """
        self.session = uuid.uuid4().hex
        self.num_failures = 0
        """Requests that got no answer."""
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._keep_alive = keep_alive
        self._on_close = on_close
        self._channel = Channel(endpoint)
        self._pools = PoolMappings(map_pool=map_pool)
        self._welcome: m.Welcome | None = None
        self._hello = 0
        """Sequence number of a hello that was not answered yet."""
        self._greeted_on = -1
        """The channel's ``connections`` when we last said hello."""
        self._next_attempt_at = 0.0
        self._welcome_by = 0.0
        """Until when a server that has just come (back) is expected to let us in: a look-up may wait for that."""
        self._timed_out_at = -_OFTEN_SECONDS
        """When a request has last waited in vain for all of its time."""
        self._no_waits_before = 0.0
        """While it is away: from when on a load may wait for it (again)."""
        self._registered: set[bytes] = set()
        self._refused: set[bytes] = set()
        """Namespaces that this server does not take; it has said why."""
        self._holdings = Holdings()
        self._has_told = False
        """Whether something was said since the last answer, that the server may not have carried out yet."""
        self._chunk_size: int | None = None
        self._closed = False

    # Connection

    @property
    def connected(self) -> bool:
        if self._closed:
            return False
        if self._welcome is not None and self._channel.connections == self._greeted_on:
            return True
        return self._greet()

    def _greet(self) -> bool:
        """Open a session if a server is there. Never waits: an answer is taken by a later call."""
        if self._welcome is not None:
            self._lost("the connection was lost")
        if self._hello:
            answer = self._channel.answer_to(self._hello)
            if answer is not None:
                self._hello = 0
                return self._answered(answer[0])
        now = time.monotonic()
        if now < self._next_attempt_at and self._greeted_on == self._channel.connections:
            return False
        self._next_attempt_at = now + _RETRY_SECONDS
        is_new = self._greeted_on != self._channel.connections
        self._greeted_on = self._channel.connections
        if self._greeted_on % 2:
            if is_new:
                self._welcome_by = now + self._timeout_seconds
            self._hello = self._channel.tell(m.Hello(m.PROTOCOL_VERSION, self.session, self._name))
        elif self._keep_alive is not None:
            self._keep_alive()
        return False

    def _answered(self, reply: m.Reply) -> bool:
        """The server answered our hello; whether it let us in."""
        if isinstance(reply, m.Refused):
            logger.error("%s refused us: %s", self._channel.endpoint, reply.reason)
            self._next_attempt_at = time.monotonic() + 60 * _RETRY_SECONDS
        if not isinstance(reply, m.Welcome):
            self._welcome_by = 0.0
            return False
        self._welcome = reply
        self._no_waits_before = 0.0
        self._registered.clear()
        self._refused.clear()
        self._chunk_size = reply.chunk_size
        for message in self._holdings.greeted(reply.pool_id):
            self._channel.tell(message)
        shared = self._pools.add(reply.pool_socket, reply.pool_id, self.session, self._timeout_seconds)
        logger.info(
            "%s: connected to kvstrata %s at %s%s",
            self._name,
            reply.server_version,
            self._channel.endpoint,
            "" if shared else "; its pool cannot be mapped from here, data goes through the socket, slower",
        )
        return True

    def wait_connected(self, timeout_seconds: float, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the server to be there: at start-up, in tools, and where the scheduler has just spoken to it.

        ``unless`` says that it will not come.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self.connected:
            if time.monotonic() >= deadline or unless():
                return False
            time.sleep(0.02)
        return True

    def _lost(self, why: str) -> None:
        logger.warning("%s: going on without the server at %s: %s", self._name, self._channel.endpoint, why)
        self._welcome = None

    @property
    def server_id(self) -> str:
        return "" if self._closed or self._welcome is None else self._welcome.pool_id

    @property
    def server_chunk_size(self) -> int | None:
        return self._chunk_size if self.connected else None

    # Requests

    def _ask(self, message: m.Message) -> Answer | None:
        """One request; None when it got no answer, after which the client is not connected."""
        if not self.connected:
            return None
        began_at = time.monotonic()
        answer = self._channel.ask(message, self._timeout_seconds)
        self._has_told = False
        if answer is None:
            self.num_failures += 1
            self._lost(f"no answer to {type(message).__name__} within {self._timeout_seconds:g} s")
            if time.monotonic() - began_at >= self._timeout_seconds:
                self._timed_out()
        elif isinstance(answer[0], m.UnknownSession):
            # It restarted, or forgot us. The next call says hello.
            self._welcome = None
            self._next_attempt_at = 0.0
            self._welcome_by = time.monotonic() + self._timeout_seconds
            return None
        elif isinstance(answer[0], m.Refused):
            logger.error(
                "%s refused %s: %s", self._channel.endpoint, type(message).__name__, answer[0].reason
            )
            return None
        return answer

    def _timed_out(self) -> None:
        """A request has waited for all of its time. If that happens often, leave the server alone for a while."""
        now = time.monotonic()
        if now - self._timed_out_at < _OFTEN_SECONDS:
            self._next_attempt_at = now + _AWAY_TIMEOUTS * self._timeout_seconds
        self._timed_out_at = now

    def _register(self, namespace: Namespace) -> bytes | None:
        """The fingerprint of a namespace that the server knows; None while there is no server."""
        if not self.connected:
            return None
        fingerprint = namespace.fingerprint
        if fingerprint in self._refused:
            return None
        if fingerprint not in self._registered:
            if self._ask(m.Register(namespace)) is None:
                if self._welcome is not None:  # it is there, and has said why: once is enough
                    self._refused.add(fingerprint)
                return None
            self._registered.add(fingerprint)
        return fingerprint

    def _tell(self, message: m.Message, payloads: Sequence[memoryview] = ()) -> bool:
        """Say something that needs no answer; False when there is nobody to say it to."""
        self._has_told = self.connected and bool(self._channel.tell(message, payloads))
        return self._has_told

    # Verbs

    def lookup(
        self,
        request_id: str,
        namespace: Namespace,
        prefix: Prefix,
        first_token: int = 0,
        *,
        traceparent: str = "",
    ) -> Hit:
        fingerprint = self._register(namespace)
        asked = fingerprint is not None
        if fingerprint is not None:
            match self._ask(m.Lookup(request_id, fingerprint, prefix, first_token, traceparent)):
                case (m.LookupReply(hit=hit), _):
                    self._holdings.looked_up(request_id, hit)
                    return hit
                case _:
                    pass
        self._holdings.lookup_lost(request_id, asked=asked)
        is_away = self._welcome is None  # one that is there and has refused the namespace is not waited for
        return PENDING if is_away and time.monotonic() < self._welcome_by else NO_HIT

    def release(self, request_id: str) -> None:
        self._holdings.released(request_id)
        message = m.Release(request_id)
        if not self._tell(message):
            self._holdings.owe(message)

    def payloads(
        self, request_id: str, shard: int, hit: Hit, namespace: Namespace
    ) -> list[memoryview] | None:
        if not hit.pieces:
            return []
        sizes = [namespace.layout.payload_bytes(piece.num_tokens) for piece in hit.pieces]
        pool = self.mapped_pool(hit.pool_id)
        if pool is None and self._is_found():
            pool = self.mapped_pool(hit.pool_id)
        if pool is not None:
            return [pool[o : o + size] for o, size in zip(hit.offsets[shard], sizes, strict=True)]
        fingerprint = self._register(namespace)
        if fingerprint is None:
            return None
        hashes = tuple(piece.chunk_hash for piece in hit.pieces)
        fetched: list[memoryview] = []
        for part in _parts(sizes):
            match self._ask(m.Fetch(request_id, shard, fingerprint, hashes[part])):
                case (m.Fetched(found=True), payloads) if [len(p) for p in payloads] == sizes[part]:
                    fetched += payloads
                case _:
                    return None
        return fetched

    def _is_found(self) -> bool:
        """Whether there is a server now. It may be new to us: then this waits for it, unless that was in vain."""
        now = time.monotonic()
        wait_seconds = self._timeout_seconds if now >= self._no_waits_before else 0.0
        if self.wait_connected(wait_seconds):
            return True
        if wait_seconds:
            self._no_waits_before = now + _WAIT_PAUSE_SECONDS
        return False

    def reserve(
        self,
        namespace: Namespace,
        shard: int,
        pieces: Sequence[Piece],
        *,
        traceparents: Sequence[str] = (),
    ) -> Reservation:
        nothing = Reservation(namespace, shard, pieces, [None] * len(pieces), [None] * len(pieces), "")
        fingerprint = self._register(namespace)
        if fingerprint is None:
            return nothing
        match self._ask(m.Reserve(fingerprint, shard, tuple(pieces), tuple(traceparents))):
            case (m.Reserved(slots=slots, pool_id=pool_id), _) if len(slots) == len(pieces):
                pool = self.mapped_pool(pool_id)
            case _:
                self._holdings.reserve_lost(shard, [piece.chunk_hash for piece in pieces])
                return nothing
        buffers = [
            None
            if slot is None
            else pool[slot.offset : slot.offset + slot.payload_bytes]
            if pool is not None
            else memoryview(bytearray(slot.payload_bytes))
            for slot in slots
        ]
        reservation = Reservation(namespace, shard, pieces, slots, buffers, pool_id)
        self._holdings.reserved(shard, reservation.reserved_hashes)
        return reservation

    def commit(self, reservation: Reservation) -> None:
        inline = self.mapped_pool(reservation.pool_id) is None
        payloads = [b for b in reservation.buffers if b is not None] if inline else []
        hashes = reservation.end()
        for start in range(0, len(hashes), _PART_HASHES):
            part = slice(start, start + _PART_HASHES)
            self._end(reservation, m.Commit(reservation.shard, hashes[part]), payloads[part])

    def abort(self, reservation: Reservation) -> None:
        self._end(reservation, m.Abort(reservation.shard, reservation.end()))

    def _end(
        self, reservation: Reservation, message: m.Commit | m.Abort, payloads: Sequence[memoryview] = ()
    ) -> None:
        """End a reservation at the server that made it. What cannot be said now is given back later."""
        shard, hashes = message.shard, message.chunk_hashes
        if not hashes:
            return
        told = (
            self.connected and reservation.pool_id == self._holdings.pool_id and self._tell(message, payloads)
        )
        if reservation.pool_id == self._holdings.pool_id:
            self._holdings.ended(shard, hashes)
            if not told:
                self._holdings.owe(m.Abort(shard, hashes))

    def report_prefill(self, namespace: Namespace, num_tokens: int, seconds: float) -> None:
        if namespace.fingerprint in self._registered:
            self._tell(m.ReportPrefill(namespace.fingerprint, num_tokens, seconds))

    def report_move(self, num_bytes: int, seconds: float, *, is_store: bool) -> None:
        if self.connected:
            self._tell(m.ReportMove(is_store, num_bytes, seconds))

    def clear(self, namespace: Namespace | None = None, *, tiers: bool = True) -> int | None:
        fingerprint = None
        if namespace is not None:
            fingerprint = self._register(namespace)
            if fingerprint is None:
                return None
        match self._ask(m.Clear(fingerprint, tiers)):
            case (m.Cleared(entries=entries), _):
                return entries
            case _:
                return None

    def keys(self, prefix: str = "", limit: int = 1000) -> list[str]:
        match self._ask(m.ListKeys(prefix, limit)):
            case (m.Keys(keys=keys), _):
                return list(keys)
            case _:
                return []

    def stats(self) -> dict[str, Any]:
        match self._ask(m.GetStats()):
            case (m.Stats(stats=stats), _):
                return stats
            case _:
                return {}

    def mapped_pool(self, pool_id: str) -> memoryview | None:
        return self._pools.get(pool_id)

    def close(self) -> None:
        if not self._closed:
            if self._has_told:
                # The end of the pool's connection may be seen before what was said; a commit would be lost.
                self._ask(m.Ping())
            self._tell(m.Goodbye())
            self._closed = True
            self._channel.close()
            self._pools.close()
            if self._on_close is not None:
                self._on_close()


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Which payloads of those sizes are fetched together."""
    start = part_bytes = 0
    for end, size in enumerate(sizes):
        if end > start and (end - start == _PART_HASHES or part_bytes + size > _PART_BYTES):
            yield slice(start, end)
            start, part_bytes = end, 0
        part_bytes += size
    yield slice(start, len(sizes))
