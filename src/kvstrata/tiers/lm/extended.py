"""Batches in the extended language of ``lm://``, for kvstrata's own server."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.lm import wire
from kvstrata.tiers.lm.connection import Connection
from kvstrata.types import Buffer, Miss, MissReason

_MAX_AHEAD = 1024
"""Writes ahead of their answers, so that neither side waits for the other to read."""


def batches(keys: Sequence[bytes]) -> list[Sequence[bytes]]:
    """``keys`` in pieces that one call can hold."""
    most = min(wire.MAX_KEYS, wire.MAX_KEYS_BYTES // (wire.MAX_KEY_BYTES + 8))
    if len(keys) <= most:
        return [keys]
    return [keys[first : first + most] for first in range(0, len(keys), most)]


def _call(verb: wire.Verb, keys: Sequence[bytes], rooms: Sequence[int] | None = None) -> list[Buffer]:
    packed = wire.pack_keys(keys, rooms)
    return [wire.Call(verb, len(keys), len(packed)).pack(), packed]


def contains(connection: Connection, keys: Sequence[bytes]) -> list[bool]:
    """One call."""
    connection.send(_call(wire.Verb.CONTAINS, keys))
    answer = connection.answer(wire.Verb.CONTAINS)
    if answer.body_bytes != len(keys):
        raise connection.violated(f"{answer.body_bytes} answers for {len(keys)} keys")
    return [held == 1 for held in connection.body(len(keys))]


def read(
    connection: Connection, keys: Sequence[bytes], buffers: Sequence[memoryview], *, with_checksum: bool
) -> list[int | Miss]:
    """One call; the server sends frames as fast as they are taken."""
    rooms = [min(len(buffer), wire.MAX_ROOM) for buffer in buffers]
    connection.send(_call(wire.Verb.READ, keys, rooms))
    return [
        _take(connection, key, buffer, with_checksum=with_checksum)
        for key, buffer in zip(keys, buffers, strict=True)
    ]


def _take(connection: Connection, key: bytes, buffer: memoryview, *, with_checksum: bool) -> int | Miss:
    answer = connection.answer(wire.Verb.READ)
    if answer.status == wire.Status.TOO_LARGE:
        return Miss(MissReason.CORRUPT, f"frame of {answer.number} bytes for a buffer of {len(buffer)}")
    if answer.status != wire.Status.OK:
        return Miss(MissReason.ABSENT)
    if answer.body_bytes > len(buffer):
        raise connection.violated(f"{answer.body_bytes} bytes where there is room for {len(buffer)}")
    frame = buffer[: answer.body_bytes]
    connection.receive_all(frame)
    if with_checksum and answer.checksum and wire.checksum(key, frame) != answer.checksum:
        return Miss(MissReason.CORRUPT, "the checksum of the frame is wrong")
    return answer.body_bytes


def write(
    connection: Connection,
    keys: Sequence[bytes],
    frames: Sequence[memoryview],
    *,
    ttl_seconds: int,
    with_checksum: bool,
) -> None:
    """One call per frame, sent ahead. All are attempted.

    Raises:
        TierFull: the server had no room for one of them.
        TierUnavailable: one arrived damaged.
    """
    refusals: list[wire.Status] = []
    pairs = iter(zip(keys, frames, strict=True))
    while batch := list(islice(pairs, _MAX_AHEAD)):
        parts: list[Buffer] = []
        for key, frame in batch:
            packed = wire.pack_keys([key])
            checksum = wire.checksum(key, frame) if with_checksum else 0
            call = wire.Call(wire.Verb.WRITE, 1, len(packed), len(frame), ttl_seconds, checksum)
            parts += [call.pack() + packed, frame]
        connection.send(parts)
        answers = [connection.answer(wire.Verb.WRITE) for _ in batch]
        refusals += [wire.Status(answer.status) for answer in answers if answer.status != wire.Status.OK]
    if wire.Status.CORRUPT in refusals:
        raise TierUnavailable("a frame arrived with another checksum")
    if refusals:
        raise TierFull(f"the server has no room for {len(refusals)} of {len(keys)} frames")


def delete(connection: Connection, keys: Sequence[bytes]) -> int:
    """One call."""
    connection.send(_call(wire.Verb.DELETE, keys))
    return connection.answer(wire.Verb.DELETE).number


def scan_page(connection: Connection, prefix: bytes, cursor: bytes) -> tuple[bytes, list[bytes]]:
    """Where to go on (empty at the end), and some keys."""
    connection.send(_call(wire.Verb.SCAN, [prefix, cursor]))
    answer = connection.answer(wire.Verb.SCAN)
    if answer.status != wire.Status.OK:
        raise connection.refused("it has forgotten this scan, as there were many; start over")
    keys = connection.keys(answer.body_bytes)
    if not keys:
        raise connection.violated("a page of keys that does not say where to go on")
    return keys[0], keys[1:]


def stats(connection: Connection) -> tuple[int, int, int]:
    """Entries, bytes used, budget in bytes."""
    connection.send(_call(wire.Verb.STATS, []))
    if connection.answer(wire.Verb.STATS).body_bytes != wire.STATS_BYTES:
        raise connection.violated("statistics of another length")
    return wire.unpack_stats(connection.body(wire.STATS_BYTES))
