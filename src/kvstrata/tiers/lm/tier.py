"""The lm tier: frames in a kvstrata remote server (``kvstrata remote``), or in a server of LMCache."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec

from kvstrata.errors import ConfigError, TierFull
from kvstrata.tiers.base import ExpiringTier, TierOptions
from kvstrata.tiers.lm import extended, plain, wire
from kvstrata.tiers.lm.endpoint import parse_url, read_token
from kvstrata.tiers.lm.server import Server
from kvstrata.types import Miss, TierStats, is_key

log = logging.getLogger(__name__)


class LmOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the lm tier. ``timeout_seconds`` bounds one batch on one connection, as a whole."""

    url: str
    """``lm://[:token@]host:port``, or ``lms://`` for TLS."""
    token_file: str | None = None
    """File with the token, in place of the URL's."""
    ttl_seconds: int | None = None
    """Entries expire after this time, if the server does not let them expire earlier."""
    checksums: bool = False
    """Whether each frame has a checksum on its way, which the server verifies when it is written and this tier when
    it is read. The frame's own checksum is verified above the tiers in any case."""
    connect_timeout_seconds: float = 2.0
    """Deadline of connecting, the TLS handshake and the proof of the token included."""

    def __post_init__(self) -> None:
        """So that ``kvstrata config check`` finds a wrong URL."""
        try:
            endpoint = parse_url(self.url)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if endpoint.token and self.token_file:
            raise ValueError("the lm tier has a token in its url and a token_file; expected one of them")
        if self.ttl_seconds is not None and not 0 < self.ttl_seconds < 2**32:
            raise ValueError(f"ttl_seconds of the lm tier is {self.ttl_seconds}; it must be positive")

    def __repr__(self) -> str:
        """Without the URL, which may hold a token."""
        return f"LmOptions(name={self.name!r})"


class LmTier(ExpiringTier):
    """Frames in a server that speaks ``lm://``. Which language it speaks is found out with each connection."""

    kind: ClassVar[str] = "lm"
    Options: ClassVar[type[TierOptions]] = LmOptions

    def __init__(self, options: LmOptions) -> None:
        """Read the token and TLS files; the first connection is made by the first operation.

        Raises:
            ConfigError: a file cannot be used.
        """
        self.options = options
        endpoint = parse_url(options.url)
        self._where = endpoint.describe()
        token = read_token(options.token_file) if options.token_file else endpoint.token.encode()
        self._server = Server(
            endpoint,
            token,
            num_connections=options.num_workers,
            connect_timeout_seconds=options.connect_timeout_seconds,
            timeout_seconds=options.timeout_seconds,
        )

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. From LMCache's server also entries that were deleted; reading them is a miss."""
        if not keys:
            return []
        with self._server.connection() as connection:
            if connection.hello is None:
                return plain.contains(connection, _plain(keys))
            pieces = extended.batches(_names(keys))
            return [held for piece in pieces for held in extended.contains(connection, piece)]

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`. The kernel copies from the socket into ``buffers``."""
        if len(keys) != len(buffers):
            raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
        if not keys:
            return []
        with self._server.connection() as connection:
            if connection.hello is None:
                return plain.read(connection, _plain(keys), buffers)
            results: list[int | Miss] = []
            for piece in extended.batches(_names(keys)):
                results += extended.read(
                    connection,
                    piece,
                    buffers[len(results) : len(results) + len(piece)],
                    with_checksum=self.options.checksums,
                )
            return results

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`.

        Raises:
            TierFull: the server has no room for a frame, or takes none of this size.
        """
        if len(keys) != len(frames):
            raise ValueError(f"{len(keys)} keys with {len(frames)} frames")
        if not keys:
            return
        largest = max(map(len, frames))
        with self._server.connection() as connection:
            if connection.hello is None:
                plain.write(connection, _plain(keys), frames)
                return
            if largest > connection.hello.max_frame_bytes:
                raise TierFull(
                    f"{self._where}: a frame of {largest} bytes; the server takes up to"
                    f" {connection.hello.max_frame_bytes} (--max-frame-mb)"
                )
            extended.write(
                connection,
                _names(keys),
                frames,
                ttl_seconds=self.options.ttl_seconds or 0,
                with_checksum=self.options.checksums,
            )

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`."""
        if not keys:
            return 0
        with self._server.connection() as connection:
            if connection.hello is None:
                return plain.delete(connection, _plain(keys))
            return sum(extended.delete(connection, piece) for piece in extended.batches(_names(keys)))

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`. Page by page. LMCache's server cannot list: nothing is found there, which is logged"""
        cursor = b""
        while True:
            with self._server.connection() as connection:
                if connection.hello is None:
                    log.warning(
                        "%s: a server of LMCache cannot list its entries; none are shown", self._where
                    )
                    return
                cursor, names = extended.scan_page(connection, prefix.encode(), cursor)
            for name in names:
                key = name.decode("utf-8", "replace")
                if key.startswith(prefix) and is_key(
                    key
                ):  # others are those of an LMCache client of the same server
                    yield key
            if not cursor:
                return

    def stats(self) -> TierStats:
        """See :class:`Tier`. Those of the whole server, which may have other clients; LMCache's does not say."""
        with self._server.connection() as connection:
            if connection.hello is None:
                return TierStats()
            entries, used_bytes, budget_bytes = extended.stats(connection)
        return TierStats(entries, used_bytes, budget_bytes)

    @property
    def ttl_seconds(self) -> int | None:
        return self.options.ttl_seconds

    def set_ttl(self, seconds: int | None) -> None:
        self.options = msgspec.structs.replace(self.options, ttl_seconds=seconds)

    def describe(self) -> str:
        return self._where

    def close(self) -> None:
        self._server.close()


def _names(keys: Sequence[str]) -> list[bytes]:
    return [key.encode() for key in keys]


def _plain(keys: Sequence[str]) -> list[bytes]:
    return [wire.plain_key(key) for key in keys]
