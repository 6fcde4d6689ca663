"""The Redis tier: two entries per shard, over RESP connections of our own.

redis-py is not used: it cannot read a value into the caller's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from kvstrata.errors import ConfigError, TierError, TierFull
from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.tiers.redis import batch
from kvstrata.tiers.redis.endpoint import parse_url
from kvstrata.tiers.redis.entry import METADATA_SUFFIX, VALUE_SUFFIX, escape_glob, is_key, metadata
from kvstrata.tiers.redis.resp import MAX_BULK_BYTES, Connection, ErrorReply, TooLong
from kvstrata.tiers.redis.server import Server
from kvstrata.types import Miss, MissReason, TierStats


class RedisOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the Redis tier. ``timeout_seconds`` bounds one batch on one connection, as a whole."""

    url: str
    """``redis://[user:password@]host[:port][/db]``, ``rediss://...`` or ``unix://path``."""
    ttl_seconds: int | None = None
    """Entries expire after this time; None leaves it to the server's maxmemory-policy to make room."""
    refresh_ttl: bool = False
    """Whether a hit starts the time anew."""
    key_prefix: str = ""
    """In front of every key, to share a server with others."""
    connect_timeout_seconds: float = 2.0
    max_value_bytes: int = MAX_BULK_BYTES
    """Larger frames are refused."""

    def __repr__(self) -> str:
        """Without the URL, which may hold a password."""
        return f"RedisOptions(name={self.name!r})"


class RedisTier(Tier):
    """Frames in a Redis or Valkey server."""

    kind: ClassVar[str] = "redis"
    Options: ClassVar[type[TierOptions]] = RedisOptions

    def __init__(self, options: RedisOptions) -> None:
        """Check the settings; the first connection is made by the first operation.

        Raises:
            ConfigError: a setting cannot be used.
        """
        _check(options)
        self.options = options
        self._prefix = options.key_prefix.encode()
        self._server = Server(
            parse_url(options.url),
            num_connections=options.num_workers,
            connect_timeout_seconds=options.connect_timeout_seconds,
            timeout_seconds=options.timeout_seconds,
            ttl_is_set=options.ttl_seconds is not None,
        )

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. One EXISTS per key in one pipeline."""
        if not keys:
            return []
        names = [self._value_key(key) for key in keys]
        with self._server.connection() as connection:
            values = batch.exists_many(connection, names)
            failure = self._failure(connection, values)
        if failure:
            raise failure
        return [value == 1 for value in values]

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`. The kernel copies from the socket into ``buffers``."""
        if len(keys) != len(buffers):
            raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
        if not keys:
            return []
        names = [self._value_key(key) for key in keys]
        with self._server.connection() as connection:
            values = batch.get_many(connection, names, buffers)
            failure = self._failure(connection, values)
            if self.options.refresh_ttl and not failure:
                held = [key for key, value in zip(keys, values, strict=True) if isinstance(value, int)]
                self._refresh(connection, held)
        if failure:
            raise failure
        return [_result(value, len(buffer)) for value, buffer in zip(values, buffers, strict=True)]

    def _refresh(self, connection: Connection, keys: Sequence[str]) -> None:
        if self.options.ttl_seconds is None or not keys:
            return
        names = [name for key in keys for name in (self._value_key(key), self._metadata_key(key))]
        batch.expire_many(connection, names, self.options.ttl_seconds)

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`.

        Raises:
            TierFull: the server is out of memory and evicts nothing, or a frame exceeds ``max_value_bytes``.
            ValueError: not a key.
        """
        entries = [
            batch.Entry(self._value_key(key), self._metadata_key(key), frame, metadata(key, frame))
            for key, frame in zip(keys, frames, strict=True)
        ]
        largest = max((len(frame) for frame in frames), default=0)
        if largest > self.options.max_value_bytes:
            raise TierFull(f"a frame of {largest} bytes; max_value_bytes is {self.options.max_value_bytes}")
        if not entries:
            return
        with self._server.connection() as connection:
            refused = batch.set_many(connection, entries, self.options.ttl_seconds)
            failure = self._failure(connection, refused)
        if failure:
            raise failure

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`. Memory is freed by the server in the background."""
        if not keys:
            return 0
        names = [*map(self._value_key, keys), *map(self._metadata_key, keys)]
        with self._server.connection() as connection:
            values = batch.unlink_many(connection, names)
            failure = self._failure(connection, values)
        if failure:
            raise failure
        return sum(value == 1 for value in values[: len(keys)])

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`. By SCAN, page by page; what a rehash shows twice is given once."""
        pattern = escape_glob(self._prefix + prefix.encode()) + b"*" + VALUE_SUFFIX
        cursor, seen = b"0", set[str]()
        while True:
            with self._server.connection() as connection:
                page = batch.scan_page(connection, cursor, pattern)
                failure = self._failure(connection, [page])
            if failure or isinstance(page, ErrorReply):
                raise failure or TierError("SCAN was refused")
            cursor, names = page
            for name in names:
                key = name[len(self._prefix) : -len(VALUE_SUFFIX)].decode("utf-8", "replace")
                if key.startswith(prefix) and is_key(key) and key not in seen:
                    seen.add(key)
                    yield key
            if cursor == b"0":
                return

    def stats(self) -> TierStats:
        """See :class:`Tier`. Bytes and budget are those of the whole server, which may have other users."""
        with self._server.connection() as connection:
            found = self._server.info(connection, b"memory")
        budget = int(found.get("maxmemory", 0))
        return TierStats(used_bytes=int(found.get("used_memory", 0)), budget_bytes=budget or None)

    def describe(self) -> str:
        return self._server.endpoint.describe()

    def close(self) -> None:
        self._server.close()

    def _value_key(self, key: str) -> bytes:
        return self._prefix + key.encode() + VALUE_SUFFIX

    def _metadata_key(self, key: str) -> bytes:
        return self._prefix + key.encode() + METADATA_SUFFIX

    def _failure(self, connection: Connection, replies: Sequence[object]) -> TierError | None:
        """The exception for the first reply that refuses to serve."""
        for reply in replies:
            if isinstance(reply, ErrorReply) and reply.code != "WRONGTYPE":
                return self._server.refusal(connection, reply)
        return None


def _check(options: RedisOptions) -> None:
    if options.ttl_seconds is not None and options.ttl_seconds <= 0:
        raise ConfigError(f"ttl_seconds of the redis tier is {options.ttl_seconds}; it must be positive")
    if not 0 < options.max_value_bytes <= MAX_BULK_BYTES:
        raise ConfigError(
            f"max_value_bytes of the redis tier is {options.max_value_bytes}; allowed are 1 to"
            f" {MAX_BULK_BYTES}"
        )


def _result(value: int | ErrorReply | TooLong | None, room: int) -> int | Miss:
    match value:
        case int():
            return value
        case None:
            return Miss(MissReason.ABSENT)
        case TooLong(size=size):
            return Miss(MissReason.CORRUPT, f"value of {size} bytes for a buffer of {room}")
        case ErrorReply(text=text):
            return Miss(MissReason.CORRUPT, text)
