"""Batches in the plain language of ``lm://``: pipelines of single requests, for LMCache's own server.

That server cannot list or delete. A deleted entry is replaced by an empty one that says so: its memory is free and
reading it is a miss, but EXIST still finds it.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.errors import TierFull
from kvstrata.tiers.lm import wire
from kvstrata.tiers.lm.connection import Connection
from kvstrata.types import Buffer, Miss, MissReason

WINDOW_BYTES = 8 << 20
"""Values asked for ahead of their reading; bounds what the server holds for one connection."""
_MAX_AHEAD = 1024
"""Requests ahead of their replies, so that neither side waits for the other to read."""

_BARRIER = wire.Request(wire.Command.HEALTH, wire.plain_key("")).pack()


def contains(connection: Connection, keys: Sequence[bytes]) -> list[bool]:
    """One EXIST per key, all of them sent ahead."""
    held: list[bool] = []
    for first in range(0, len(keys), _MAX_AHEAD):
        batch = keys[first : first + _MAX_AHEAD]
        connection.send([b"".join([wire.Request(wire.Command.EXIST, key).pack() for key in batch])])
        for _ in batch:
            reply = connection.plain_reply()
            if reply.length:
                raise connection.violated("bytes in the reply to EXIST")
            held.append(reply.code == wire.OK)
    return held


def read(connection: Connection, keys: Sequence[bytes], buffers: Sequence[memoryview]) -> list[int | Miss]:
    """One GET per key, some of them sent ahead."""
    results: list[int | Miss] = []
    asked, ahead = 0, 0
    for at, buffer in enumerate(buffers):
        first = asked
        while asked < len(keys) and (
            asked == at or (ahead + len(buffers[asked]) <= WINDOW_BYTES and asked - at < _MAX_AHEAD)
        ):
            ahead += len(buffers[asked])
            asked += 1
        if first < asked:
            requests = [wire.Request(wire.Command.GET, key).pack() for key in keys[first:asked]]
            connection.send([b"".join(requests)])
        results.append(_take(connection, buffer))
        ahead -= len(buffer)
    return results


def _take(connection: Connection, buffer: memoryview) -> int | Miss:
    reply = connection.plain_reply()
    if reply.code == wire.FAIL:
        return Miss(MissReason.ABSENT)
    if reply.length > len(buffer):
        connection.drop(reply.length)
        return Miss(MissReason.CORRUPT, f"frame of {reply.length} bytes for a buffer of {len(buffer)}")
    connection.receive_all(buffer[: reply.length])
    if reply.form.format == wire.DELETED_FORMAT:
        return Miss(MissReason.ABSENT)
    if reply.form.format != wire.FRAME_FORMAT:
        return Miss(MissReason.CORRUPT, f"an entry of format {reply.form.format}, which is not ours")
    return reply.length


def write(connection: Connection, keys: Sequence[bytes], frames: Sequence[memoryview]) -> None:
    """One PUT per key. They are not answered; a HEALTH request after them is, and when it is they are stored."""
    parts: list[Buffer] = []
    for key, frame in zip(keys, frames, strict=True):
        if len(frame) > wire.MAX_LENGTH:
            raise TierFull(f"a frame of {len(frame)} bytes; an lm server takes up to {wire.MAX_LENGTH}")
        form = wire.Form(wire.FRAME_FORMAT, shape=(len(frame), 0, 0, 0))
        parts += [wire.Request(wire.Command.PUT, key, len(frame), form).pack(), frame]
    connection.send([*parts, _BARRIER])
    _pass_barrier(connection)


def delete(connection: Connection, keys: Sequence[bytes]) -> int:
    """Replace what is held by empty entries; return how many there were."""
    held = [key for key, found in zip(keys, contains(connection, keys), strict=True) if found]
    form = wire.Form(wire.DELETED_FORMAT)
    connection.send([*(wire.Request(wire.Command.PUT, key, 0, form).pack() for key in held), _BARRIER])
    _pass_barrier(connection)
    return len(held)


def _pass_barrier(connection: Connection) -> None:
    if connection.plain_reply().length:
        raise connection.violated("bytes in the reply to HEALTH")
