"""What a batch of keys is on one connection: the pipelines, without a choice of server.

Keys are names of Redis entries (bytes). Each function sends its commands, takes every reply and returns;
an error reply is a value, so that the connection stays in order whatever the server refuses. Cluster,
Sentinel and several servers differ only in which connection gets which keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.redis.resp import Connection, ErrorReply, TooLong, command
from kvstrata.types import Buffer

WINDOW_BYTES = 8 << 20
"""Values asked for ahead of their reading; bounds what the server holds for one connection.

Measured with frames of 6 MB: Redis 7 copies each reply to fresh memory, so that 16 MiB ahead read at 0.8 and
64 MiB at 0.6 of the speed of 8 MiB; Valkey 9 does not care.
"""


class Entry(msgspec.Struct, frozen=True):
    """One shard to be written."""

    value_key: bytes
    metadata_key: bytes
    frame: memoryview
    metadata: Sequence[bytes]
    """Fields and values, alternating."""


def exists_many(connection: Connection, keys: Sequence[bytes]) -> list[int | ErrorReply]:
    """For each key 1 or 0."""
    # One template for all keys: half the time of `command` for each, and 2,000 keys are asked for at once.
    connection.send([b"".join([b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys])])
    return connection.integers(len(keys))


def unlink_many(connection: Connection, keys: Sequence[bytes]) -> list[int | ErrorReply]:
    """For each key 1 or 0."""
    connection.send([b"".join([command(b"UNLINK", key) for key in keys])])
    return connection.integers(len(keys))


def get_many(
    connection: Connection, keys: Sequence[bytes], buffers: Sequence[memoryview]
) -> list[int | ErrorReply | TooLong | None]:
    """Each value to the start of its buffer; its size, or None when there is no such key."""
    results: list[int | ErrorReply | TooLong | None] = []
    asked, ahead = 0, 0
    for at, buffer in enumerate(buffers):
        first = asked
        while asked < len(keys) and (asked == at or ahead + len(buffers[asked]) <= WINDOW_BYTES):
            ahead += len(buffers[asked])
            asked += 1
        if first < asked:
            connection.send([b"".join([command(b"GET", key) for key in keys[first:asked]])])
        results.append(connection.bulk_into(buffer))
        ahead -= len(buffer)
    return results


def expire_many(connection: Connection, keys: Sequence[bytes], ttl_seconds: int) -> list[int | ErrorReply]:
    """Start the time of each key anew; 1 or 0 for each."""
    seconds = b"%d" % ttl_seconds
    connection.send([b"".join([command(b"EXPIRE", key, seconds) for key in keys])])
    return connection.integers(len(keys))


def set_many(connection: Connection, entries: Sequence[Entry], ttl_seconds: int | None) -> list[ErrorReply]:
    """Write each frame and its metadata, both with the same time to live; return what was refused of frames.

    The metadata is for people: when only it is refused, the frame is stored none the less.
    """
    parts: list[Buffer] = []
    for entry in entries:
        key, frame = entry.value_key, entry.frame
        expiry = [] if ttl_seconds is None else [b"EX", b"%d" % ttl_seconds]
        head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (3 + len(expiry), len(key), key, len(frame))
        tail = [b"\r\n", *(b"$%d\r\n%b\r\n" % (len(part), part) for part in expiry)]
        tail.append(command(b"HSET", entry.metadata_key, *entry.metadata))
        if ttl_seconds is not None:
            tail.append(command(b"EXPIRE", entry.metadata_key, b"%d" % ttl_seconds))
        parts += [head, frame, b"".join(tail)]
    connection.send(parts)
    refused = []
    for _ in entries:
        reply = connection.reply()
        connection.integers(1 if ttl_seconds is None else 2)
        if isinstance(reply, ErrorReply):
            refused.append(reply)
    return refused


def scan_page(
    connection: Connection, cursor: bytes, pattern: bytes
) -> tuple[bytes, list[bytes]] | ErrorReply:
    """Some keys that match a glob pattern, and the cursor to go on with (``0`` at the end).

    Raises:
        TierUnavailable: the reply is not one of SCAN.
    """
    connection.send([command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"1000")])
    match connection.reply():
        case ErrorReply() as error:
            return error
        case [bytes() as following, list() as keys]:
            return following, [key for key in keys if isinstance(key, bytes)]
        case _:
            raise TierUnavailable("the server broke the protocol: SCAN gave no cursor and keys")
