"""Requests -> calls of the core -> replies. No I/O of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import assert_never

from kvstrata.__about__ import __version__
from kvstrata.cache.cache import Cache
from kvstrata.errors import LayoutError, ProtocolError
from kvstrata.protocol import messages as m
from kvstrata.protocol.checks import (
    MAX_SHARDS,
    check_hashes,
    check_namespace,
    check_pieces,
    check_prefix,
    check_shard,
)
from kvstrata.server.sessions import Session, Sessions

Answer = tuple[m.Reply | Iterator[int] | None, Sequence[memoryview | bytes]]
"""A reply with its payload parts; None for requests that get none. A clear is answered with its steps, and replied
to when they have been taken, in between other requests."""


class Dispatcher:
    """Carries out one request at a time, for the server's one thread."""

    def __init__(self, cache: Cache, sessions: Sessions, pool_socket: str, chunk_size: int | None) -> None:
        self._cache = cache
        self._sessions = sessions
        self._pool_socket = pool_socket
        self._chunk_size = chunk_size

    def dispatch(self, identity: bytes, request: m.Request, payloads: Sequence[memoryview]) -> Answer:
        """The answer to one request of the client with that identity on the socket.

        Raises:
            ProtocolError: the request's values contradict each other; nothing was done.
        """
        match request:
            case m.Hello():
                return self._hello(identity, request), ()
            case m.Ping():
                return m.Done(), ()
            case m.GetStats():
                return m.Stats(self._cache.stats() | {"sessions": len(self._sessions)}), ()
            case m.ListKeys(prefix=prefix, limit=limit):
                return m.Keys(tuple(self._cache.keys(prefix, limit))), ()
            case m.Clear(namespace=None, tiers=tiers):
                return self._cache.clearing(tiers=tiers), ()
            case m.Goodbye():
                self._sessions.goodbye(identity)
                return None, ()
            case _:
                found = self._sessions.get(identity)
                if found is None:
                    return self._unknown(request), ()
                return self._in_session(*found, request, payloads)

    def _hello(self, identity: bytes, request: m.Hello) -> m.Reply:
        if request.version != m.PROTOCOL_VERSION:
            return m.Refused(
                f"this server speaks protocol {m.PROTOCOL_VERSION} (kvstrata {__version__}), the client "
                f"{request.version}; install the same version of kvstrata on both sides"
            )
        self._sessions.open(identity, request.session, request.name)
        return m.Welcome(__version__, self._cache.pool_id, self._pool_socket, self._chunk_size)

    @staticmethod
    def _unknown(request: m.Request) -> m.Reply | None:
        return m.UnknownSession() if isinstance(request, m.ANSWERED) else None

    def _in_session(
        self, owner: str, session: Session, request: m.Request, payloads: Sequence[memoryview]
    ) -> Answer:
        """Requests that only a session can make."""
        cache = self._cache
        match request:
            case m.Register(namespace=namespace):
                check_namespace(namespace)
                try:
                    session.namespaces[namespace.fingerprint] = cache.intern(namespace)
                except LayoutError as error:
                    raise ProtocolError(str(error)) from None
                return m.Done(), ()
            case m.Release(request_id=request_id):
                cache.release(owner, request_id)
            case m.Commit(shard=shard, chunk_hashes=hashes):
                _check_slots(shard, hashes)
                self._take_inline(owner, request, payloads)
                cache.commit(owner, shard, hashes)
            case m.Abort(shard=shard, chunk_hashes=hashes):
                _check_slots(shard, hashes)
                cache.abort(owner, shard, hashes)
            case m.ReportMove(is_store=is_store, num_bytes=num_bytes, seconds=seconds):
                if num_bytes >= 0 and math.isfinite(seconds) and seconds >= 0:
                    cache.metrics.device_moved(num_bytes, seconds, is_store=is_store)
            case m.Fetch():
                found = self._fetch(owner, session, request)
                return m.Fetched(found is not None), found or ()
            case m.Lookup() | m.Reserve() | m.ReportPrefill() | m.Clear():
                return self._in_namespace(owner, session, request)
            case m.Hello() | m.Ping() | m.GetStats() | m.ListKeys() | m.Goodbye():
                raise AssertionError("dispatched without a session")
            case _:
                assert_never(request)
        return None, ()

    def _in_namespace(
        self, owner: str, session: Session, request: m.Lookup | m.Reserve | m.ReportPrefill | m.Clear
    ) -> Answer:
        """Requests that name a namespace which the session registered."""
        cache = self._cache
        namespace = session.namespaces.get(request.namespace or b"")
        if namespace is None:
            return self._unknown(request), ()
        match request:
            case m.Lookup(prefix=prefix, first_token=first):
                check_prefix(namespace, prefix, first)
                hit = cache.lookup(owner, request.request_id, namespace, prefix, first, request.traceparent)
                return m.LookupReply(hit), ()
            case m.Reserve(shard=shard, pieces=pieces, traceparents=traceparents):
                check_shard(namespace, shard)
                check_pieces(namespace, pieces)
                if traceparents and len(traceparents) != len(pieces):
                    raise ProtocolError(f"{len(traceparents)} traceparents for {len(pieces)} pieces")
                slots = cache.reserve(owner, namespace, shard, pieces, traceparents)
                return m.Reserved(tuple(slots), cache.pool_id), ()
            case m.ReportPrefill(num_tokens=num_tokens, seconds=seconds):
                if math.isfinite(seconds):
                    cache.report_prefill(namespace, num_tokens, seconds)
                return None, ()
            case m.Clear(tiers=tiers):
                return cache.clearing(namespace, tiers=tiers), ()
            case _:
                assert_never(request)

    def _fetch(self, owner: str, session: Session, request: m.Fetch) -> Sequence[memoryview | bytes] | None:
        """The payloads of the sender's own lookup, or else of the chunks that it names."""
        own = self._cache.leased_payloads(owner, request.request_id, request.shard, request.chunk_hashes)
        if own is not None:
            return own
        namespace = session.namespaces.get(request.namespace)
        if namespace is None:
            return None
        check_shard(namespace, request.shard)
        check_hashes(request.chunk_hashes)
        return self._cache.copy_payloads(namespace, request.shard, request.chunk_hashes)

    def _take_inline(self, owner: str, request: m.Commit, payloads: Sequence[memoryview]) -> None:
        """Payloads that came over the socket. One of the wrong size gives its slot back."""
        if not payloads:
            return
        for chunk_hash, data in zip(request.chunk_hashes, payloads, strict=False):
            slot = self._cache.reserved_payload(owner, request.shard, chunk_hash)
            if slot is not None and len(slot) == len(data):
                slot[:] = data
            else:
                self._cache.abort(owner, request.shard, (chunk_hash,))
        self._cache.abort(owner, request.shard, request.chunk_hashes[len(payloads) :])


def _check_slots(shard: int, chunk_hashes: Sequence[bytes]) -> None:
    """Slots that a session could have reserved."""
    if not 0 <= shard < MAX_SHARDS:
        raise ProtocolError(f"shard {shard}")
    check_hashes(chunk_hashes)
