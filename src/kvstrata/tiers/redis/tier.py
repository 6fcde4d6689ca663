"""The Redis tier: two entries per shard, over RESP connections of our own.

redis-py is not used: it cannot read a value into the caller's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from kvstrata.errors import ConfigError, TierError, TierFull, TierPartlyUnavailable, TierUnavailable
from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.tiers.redis import batch
from kvstrata.tiers.redis.batch import Commands, Count, Get, set_command
from kvstrata.tiers.redis.deployment import open_topology
from kvstrata.tiers.redis.entry import METADATA_SUFFIX, VALUE_SUFFIX, escape_glob, is_key, metadata
from kvstrata.tiers.redis.exchange import Down, Outcome, Refused, exchange
from kvstrata.tiers.redis.resp import MAX_BULK_BYTES, ErrorReply, TooLong, command
from kvstrata.tiers.redis.server import Limits, Server
from kvstrata.tiers.redis.url import parse_url
from kvstrata.types import Buffer, Miss, MissReason, TierStats


class RedisOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the Redis tier. ``timeout_seconds`` bounds one batch, as a whole."""

    url: str
    """One server, several, a Sentinel service or a cluster: docs/redis.md shows all forms."""
    ttl_seconds: int | None = None
    """Entries expire after this time; None leaves it to the server's maxmemory-policy to make room."""
    refresh_ttl: bool = False
    """Whether a hit starts the time anew."""
    key_prefix: str = ""
    """In front of every key, to share a server with others. End it with a character like ``:``."""
    connect_timeout_seconds: float = 2.0
    max_value_bytes: int = MAX_BULK_BYTES
    """Larger frames are refused."""

    def __post_init__(self) -> None:
        """Check the settings that types do not. Raises ValueError, which msgspec turns into a ValidationError."""
        try:
            parse_url(self.url)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.ttl_seconds is not None and self.ttl_seconds <= 0:
            raise ValueError(f"ttl_seconds of the redis tier is {self.ttl_seconds}; it must be positive")
        if not 0 < self.max_value_bytes <= MAX_BULK_BYTES:
            raise ValueError(
                f"max_value_bytes of the redis tier is {self.max_value_bytes}; allowed are 1 to {MAX_BULK_BYTES}"
            )

    def __repr__(self) -> str:
        """Without the URL, which may hold a password."""
        return f"RedisOptions(name={self.name!r})"


class RedisTier(Tier):
    """Frames in Redis or Valkey: one server or many."""

    kind: ClassVar[str] = "redis"
    Options: ClassVar[type[TierOptions]] = RedisOptions

    def __init__(self, options: RedisOptions) -> None:
        """The first connection is made by the first operation.

        Raises:
            ConfigError: a certificate file cannot be used.
        """
        self.options = options
        self._prefix = options.key_prefix.encode()
        self._deployment = parse_url(options.url)
        limits = Limits(
            num_connections=options.num_workers,
            connect_timeout_seconds=options.connect_timeout_seconds,
            timeout_seconds=options.timeout_seconds,
            ttl_is_set=options.ttl_seconds is not None,
        )
        self._topology = open_topology(self._deployment, limits)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. One EXISTS per key, all servers asked at once."""
        if not keys:
            return []
        outcomes = exchange(self._topology, Count(b"EXISTS", [self._value_name(key) for key in keys]))
        self._raise_refusals(outcomes)
        self._raise_if_down(outcomes)
        return [outcome == 1 for outcome in outcomes]

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`. The kernel copies from the socket into ``buffers``."""
        if len(keys) != len(buffers):
            raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
        if not keys:
            return []
        outcomes = exchange(self._topology, Get([self._value_name(key) for key in keys], buffers))
        self._raise_refusals(outcomes)
        self._raise_if_down(outcomes)
        if self.options.refresh_ttl:
            self._refresh(
                [key for key, outcome in zip(keys, outcomes, strict=True) if isinstance(outcome, int)]
            )
        return [_result(outcome, len(buffer)) for outcome, buffer in zip(outcomes, buffers, strict=True)]

    def _refresh(self, keys: Sequence[str]) -> None:
        if self.options.ttl_seconds is None or not keys:
            return
        names = [name for key in keys for name in (self._value_name(key), self._metadata_name(key))]
        exchange(self._topology, Count(b"EXPIRE", names, (b"%d" % self.options.ttl_seconds,)))

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`.

        The metadata is for people: when only it is refused, the frame is stored none the less.

        Raises:
            TierFull: a server is out of memory and evicts nothing.
            TierPartlyUnavailable: those who are to have some of the frames are down, others are not.
            ValueError: not a key.
        """
        ttl = self.options.ttl_seconds
        largest = max((len(frame) for frame in frames), default=0)
        if largest > self.options.max_value_bytes:
            raise TierFull(f"a frame of {largest} bytes; max_value_bytes is {self.options.max_value_bytes}")
        names: list[bytes] = []
        commands: list[Sequence[Buffer]] = []
        values: list[int] = []
        for key, frame in zip(keys, frames, strict=True):
            fields = metadata(key, frame)
            value, hash_ = self._value_name(key), self._metadata_name(key)
            values.append(len(names))
            names += [value, hash_]
            commands += [set_command(value, frame, ttl), [command(b"HSET", hash_, *fields)]]
            if ttl is not None:
                names.append(hash_)
                commands.append([command(b"EXPIRE", hash_, b"%d" % ttl)])
        if not names:
            return
        outcomes = exchange(self._topology, Commands(names, commands))
        self._raise_unless_done([outcomes[at] for at in values])

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`. Memory is freed by the server in the background."""
        if not keys:
            return 0
        names = [*map(self._value_name, keys), *map(self._metadata_name, keys)]
        outcomes = exchange(self._topology, Count(b"UNLINK", names))
        self._raise_unless_done(outcomes)
        return sum(outcome == 1 for outcome in outcomes[: len(keys)])

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`. By SCAN, server after server; what comes twice is given once.

        Raises:
            TierPartlyUnavailable: at the end, when a server could not be asked.
        """
        seen = set[str]()
        missing: list[TierUnavailable] = []
        servers = self._topology.servers()
        for server in servers:
            try:
                if len(servers) > 1 and not server.outage.is_over():
                    raise TierUnavailable(server.outage.reason)
                for name in self._names(server, prefix):
                    key = name[len(self._prefix) : -len(VALUE_SUFFIX)].decode("utf-8", "replace")
                    if key.startswith(prefix) and is_key(key) and key not in seen:
                        seen.add(key)
                        yield key
            except TierUnavailable as error:
                if len(servers) == 1:
                    raise
                missing.append(error)
        if missing:
            raise TierPartlyUnavailable(f"not all servers could be listed: {missing[0]}")

    def _names(self, server: Server, prefix: str) -> Iterator[bytes]:
        """The names of frames on a server whose keys begin with ``prefix``, page by page."""
        pattern = escape_glob(self._prefix + prefix.encode()) + b"*" + VALUE_SUFFIX
        cursor = b"0"
        while True:
            with server.connection() as connection:
                page = batch.scan_page(connection, cursor, pattern)
            if isinstance(page, ErrorReply):
                raise server.refusal(page)
            cursor, names = page
            yield from names
            if cursor == b"0":
                return

    def stats(self) -> TierStats:
        """See :class:`Tier`. Bytes and budget are those of whole servers, which may have other users."""
        servers = self._topology.servers()
        found = [server.info("memory") for server in servers if len(servers) == 1 or server.outage.is_over()]
        if not found:
            raise TierUnavailable(f"{self.describe()}: all servers are down")
        budgets = [int(fields.get("maxmemory", 0)) for fields in found]
        return TierStats(
            used_bytes=sum(int(fields.get("used_memory", 0)) for fields in found),
            budget_bytes=sum(budgets) if all(budgets) else None,
        )

    def describe(self) -> str:
        return self._deployment.describe()

    def close(self) -> None:
        self._topology.close()

    def _value_name(self, key: str) -> bytes:
        return self._prefix + key.encode() + VALUE_SUFFIX

    def _metadata_name(self, key: str) -> bytes:
        return self._prefix + key.encode() + METADATA_SUFFIX

    def _raise_if_down(self, outcomes: Sequence[Outcome]) -> None:
        """Raise when a server is down and no other is left; what a lost one of several has is missed."""
        down = next((outcome for outcome in outcomes if isinstance(outcome, Down)), None)
        if down is not None and not self._topology.is_partly_up:
            raise TierUnavailable(down.reason)

    def _raise_refusals(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Refused) and outcome.reply.code != "WRONGTYPE":
                raise outcome.server.refusal(outcome.reply)

    def _raise_unless_done(self, outcomes: Sequence[Outcome]) -> None:
        """Raise when something of a change was not made."""
        self._raise_if_down(outcomes)
        self._raise_refusals(outcomes)
        for outcome in outcomes:
            if isinstance(outcome, Down):
                raise TierPartlyUnavailable(outcome.reason)


def _result(outcome: Outcome, room: int) -> int | Miss:
    match outcome:
        case int():
            return outcome
        case None:
            return Miss(MissReason.ABSENT)
        case TooLong(size=size):
            return Miss(MissReason.CORRUPT, f"value of {size} bytes for a buffer of {room}")
        case Down(reason=reason):
            return Miss(MissReason.TIER_DOWN, reason)
        case Refused(reply=reply):
            return Miss(MissReason.CORRUPT, reply.text)
        case _:
            raise TierError("the server gave something else than a value")
