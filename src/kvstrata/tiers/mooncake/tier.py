"""The Mooncake tier: frames as objects of a Mooncake cluster.

An object is the frame and a seal behind it (:mod:`kvstrata.tiers.seal`): an overwritten or deleted object's memory
may be in other use while someone still reads it.

Transfers go through an arena of the tier's own and not to and from the caller's memory: when the library gives one
up, it does not stop it, and late bytes would land in a slot that belongs to another entry by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.tiers.mooncake import library
from kvstrata.tiers.mooncake.master import MasterHTTP
from kvstrata.tiers.mooncake.options import MooncakeOptions, read_url
from kvstrata.tiers.mooncake.store import Store
from kvstrata.tiers.seal import SEAL_BYTES, make_seal
from kvstrata.types import Miss, MissReason, TierStats, is_key

MAX_UNASKED_BYTES = 256 << 20
"""For a buffer that is larger the object's size is asked for first (``kvstrata keys show`` has one of 4 GiB)."""


class MooncakeTier(Tier):
    """Frames in the memory of a Mooncake cluster, which evicts by itself."""

    kind: ClassVar[str] = "mooncakestore"
    Options: ClassVar[type[TierOptions]] = MooncakeOptions

    def __init__(self, options: MooncakeOptions) -> None:
        """Check the settings; the cluster is joined by the first operation.

        Raises:
            ConfigError: a setting cannot be used.
            PluginError: the library is missing.
        """
        self._master, self.options = read_url(options)
        self._store = Store(self._master, self.options)
        self._http = MasterHTTP(
            self._master.host, self.options.master_http_port, self.options.timeout_seconds
        )

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. One question to the master."""
        return self._store.exist(keys) if keys else []

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`. One batch of transfers into the arena, then a copy into ``buffers``.

        An object whose node is gone is a miss with reason ``tier_down``.

        Raises:
            TierUnavailable: the master does not answer, or no object of the batch could be transferred.
        """
        if not keys:
            return []
        rooms: dict[str, int] = {}  # the library wants each key once
        for key, buffer in zip(keys, buffers, strict=True):
            rooms[key] = max(rooms.get(key, 0), len(buffer) + SEAL_BYTES)
        sizes = [self._size(key, room) for key, room in rooms.items()]
        with self._store.arena.lend(sizes, self.options.timeout_seconds) as pieces:
            codes = self._store.get_into(list(rooms), [address for address, _ in pieces], sizes)
            found = dict(zip(rooms, zip(codes, (piece for _, piece in pieces), strict=True), strict=True))
            return [_open_object(key, *found[key], buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _size(self, key: str, room: int) -> int:
        """How much of the arena an object needs: all the room there is for it, unless that is enormous."""
        return room if room <= MAX_UNASKED_BYTES else max(SEAL_BYTES, min(room, self._store.size(key)))

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`. Frame by frame, each copied into the arena and sent from there."""
        for key, frame in zip(keys, frames, strict=True):
            size = len(frame) + SEAL_BYTES
            with self._store.arena.lend([size], self.options.timeout_seconds) as [(address, piece)]:
                piece[: len(frame)] = frame
                piece[len(frame) :] = make_seal(key, frame)
                self._store.put_from(key, address, size)

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`. Without regard to leases: who still reads finds a broken seal."""
        return self._store.remove(keys) if keys else 0

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`. The master lists all keys of the cluster in one answer; it has no other listing."""
        return (key for key in self._http.list_keys() if key.startswith(prefix) and is_key(key))

    def stats(self) -> TierStats:
        """See :class:`Tier`. Of the whole cluster, which may have other users."""
        return self._http.stats()

    def describe(self) -> str:
        return f"mooncakestore://{self._master.address}"

    def close(self) -> None:
        self._store.close()


def _open_object(key: str, code: int, piece: memoryview, buffer: memoryview) -> int | Miss:
    """Copy the frame of an object that was read into ``buffer``, and check it there."""
    if code < 0:
        return _miss(code, len(buffer))
    size = code - SEAL_BYTES
    if size < 0:
        return Miss(MissReason.CORRUPT, "the object is no frame of ours")
    if size > len(buffer):
        return _miss(library.TOO_SMALL, len(buffer))
    buffer[:size] = piece[:size]
    if make_seal(key, buffer[:size]) != piece[size:code]:
        return Miss(MissReason.CORRUPT, "the object's seal is broken")
    return size


def _miss(code: int, room: int) -> Miss:
    if code in library.GONE:
        return Miss(MissReason.ABSENT)
    if code == library.TOO_SMALL:
        return Miss(MissReason.CORRUPT, f"the frame is larger than its buffer of {room} bytes")
    return Miss(MissReason.TIER_DOWN, f"it could not be transferred: {library.code_name(code)}")
