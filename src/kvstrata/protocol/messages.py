"""The whole wire format: a typed tagged union, in MessagePack, one message per ZMQ message.

A ZMQ message has the parts ``[sequence number, message, payload...]``. The sequence number (8 bytes) pairs a
reply with its request; a request whose type is not in :data:`ANSWERED` gets no reply.
Evolution: new fields have defaults; fields never change their type; a new version number for anything else.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvstrata.types import Hit, Namespace, Piece, Prefix, Slot

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of all messages; the class name is the tag."""


# Requests


class Hello(Message, frozen=True):
    """Open a session. Sent again after a server was restarted."""

    version: int
    session: str
    """Chosen by the client, random; also said over the pool's socket, which ties the two together."""
    name: str
    """For logs: "vllm worker 0"."""


class Register(Message, frozen=True):
    """Make a namespace known; later messages name it by its fingerprint."""

    namespace: Namespace


class Lookup(Message, frozen=True):
    request_id: str
    namespace: bytes
    prefix: Prefix
    first_token: int = 0
    """What is before its chunk is not asked for."""
    traceparent: str = ""
    """W3C trace context of the request, while it is traced; also below."""


class Release(Message, frozen=True):
    request_id: str


class Reserve(Message, frozen=True):
    namespace: bytes
    shard: int
    pieces: tuple[Piece, ...]
    traceparents: tuple[str, ...] = ()
    """One per piece, of the request that it is of; or none at all."""


class Commit(Message, frozen=True):
    """Payload parts follow, one per chunk hash, from a client that cannot map the pool; none otherwise."""

    shard: int
    chunk_hashes: tuple[bytes, ...]


class Abort(Message, frozen=True):
    shard: int
    chunk_hashes: tuple[bytes, ...]


class Fetch(Message, frozen=True):
    """The payloads of an answered lookup, for a client that cannot map the pool.

    The lookup may be another client's (a scheduler's, where this one is a worker).
    """

    request_id: str
    shard: int
    namespace: bytes
    chunk_hashes: tuple[bytes, ...]


class ReportPrefill(Message, frozen=True):
    namespace: bytes
    num_tokens: int
    seconds: float


class ReportMove(Message, frozen=True):
    """A worker copied between its device and L1."""

    is_store: bool
    """Device to L1; else L1 to device."""
    num_bytes: int
    seconds: float


class Clear(Message, frozen=True):
    namespace: bytes | None = None
    """None: everything."""
    tiers: bool = True
    """Whether the tiers are emptied too, not only L1."""


class ListKeys(Message, frozen=True):
    prefix: str = ""
    limit: int = 1000


class GetStats(Message, frozen=True):
    pass


class Ping(Message, frozen=True):
    pass


class Goodbye(Message, frozen=True):
    """The session ends; the client has unmapped the pool."""


# Replies


class Welcome(Message, frozen=True):
    server_version: str
    pool_id: str
    pool_socket: str
    """Path of the unix socket that hands the pool over."""
    chunk_size: int | None
    """The chunk size that the server was told to use."""


class LookupReply(Message, frozen=True):
    hit: Hit


class Reserved(Message, frozen=True):
    slots: tuple[Slot | None, ...]
    pool_id: str


class Fetched(Message, frozen=True):
    """Payload parts follow, unless ``found`` is false."""

    found: bool


class Cleared(Message, frozen=True):
    entries: int


class Keys(Message, frozen=True):
    keys: tuple[str, ...]


class Stats(Message, frozen=True):
    stats: dict[str, Any]


class Done(Message, frozen=True):
    """The request was carried out; there is nothing to say."""


class UnknownSession(Message, frozen=True):
    """The server does not know this session or namespace: say hello (again), register (again)."""


class Refused(Message, frozen=True):
    """The request breaks the protocol."""

    reason: str


Request = (
    Hello
    | Register
    | Lookup
    | Release
    | Reserve
    | Commit
    | Abort
    | Fetch
    | ReportPrefill
    | ReportMove
    | Clear
    | ListKeys
    | GetStats
    | Ping
    | Goodbye
)
Reply = Welcome | LookupReply | Reserved | Fetched | Cleared | Keys | Stats | Done | UnknownSession | Refused

ANSWERED = (Hello, Register, Lookup, Reserve, Fetch, Clear, ListKeys, GetStats, Ping)
"""Requests that get a reply. The others are told, not asked: their sender does not wait."""
