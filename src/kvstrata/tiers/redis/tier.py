"""The Redis tier: two entries per shard, over RESP connections of our own.

redis-py is not used: it cannot read a value into the caller's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import msgspec

from kvstrata.errors import ConfigError, TierError, TierFull, TierPartlyUnavailable, TierUnavailable
from kvstrata.tiers.base import ExpiringTier, TierOptions
from kvstrata.tiers.redis import batch
from kvstrata.tiers.redis.batch import Commands, Count, Get, set_command
from kvstrata.tiers.redis.deployment import open_topology
from kvstrata.tiers.redis.entry import METADATA_SUFFIX, VALUE_SUFFIX, Entry, escape_glob, is_own_key, metadata
from kvstrata.tiers.redis.exchange import Down, Outcome, Refused, attempt, exchange
from kvstrata.tiers.redis.parts import MANIFEST_BYTES, MAX_PARTS, Manifest, must_split
from kvstrata.tiers.redis.resp import MAX_BULK_BYTES, ErrorReply, TooLong, command
from kvstrata.tiers.redis.server import Limits, Server
from kvstrata.tiers.redis.splitting import find_manifests, manifest_in, peek, read_parts, unlink, write_parts
from kvstrata.tiers.redis.url import parse_url
from kvstrata.types import Buffer, Miss, MissReason, TierStats

MIN_PART_BYTES = 1024
"""The least ``max_value_bytes``."""


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
    """Larger frames are stored in parts."""

    def __post_init__(self) -> None:
        """Check the settings that types do not. Raises ValueError, which msgspec turns into a ValidationError."""
        try:
            parse_url(self.url)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.ttl_seconds is not None and self.ttl_seconds <= 0:
            raise ValueError(f"ttl_seconds of the redis tier is {self.ttl_seconds}; it must be positive")
        if not MIN_PART_BYTES <= self.max_value_bytes <= MAX_BULK_BYTES:
            raise ValueError(
                f"max_value_bytes of the redis tier is {self.max_value_bytes}; allowed are {MIN_PART_BYTES} to"
                f" {MAX_BULK_BYTES}"
            )

    def __repr__(self) -> str:
        """Without the URL, which may hold a password."""
        return f"RedisOptions(name={self.name!r})"


class RedisTier(ExpiringTier):
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
        """See :class:`Tier`. The kernel copies from the socket into ``buffers``.

        The parts of what was split are read with one more request for all of them.
        """
        if len(keys) != len(buffers):
            raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
        if not keys:
            return []
        until = self._topology.limits.deadline()
        names = [self._value_name(key) for key in keys]
        outcomes = exchange(self._topology, Get(names, buffers), until)
        self._raise_refusals(outcomes)
        self._raise_if_down(outcomes)
        results = [_result(outcome, len(buffer)) for outcome, buffer in zip(outcomes, buffers, strict=True)]
        manifests: dict[int, Manifest] = {}
        for at, (result, buffer) in enumerate(zip(results, buffers, strict=True)):
            manifest = Manifest.unpack(buffer[:result]) if result == MANIFEST_BYTES else None
            if manifest is not None:
                manifests[at] = manifest
        joined, outcomes = read_parts(self._topology, names, buffers, manifests, until)
        self._raise_if_down(outcomes)
        for at, result in joined.items():
            results[at] = result
        ttl_seconds = self.options.ttl_seconds  # may be changed at any time
        if self.options.refresh_ttl and ttl_seconds is not None:
            held = [at for at, result in enumerate(results) if isinstance(result, int)]
            refreshed = [name for at in held for name in (names[at], self._metadata_name(keys[at]))]
            refreshed += [name for at in held if at in manifests for name in manifests[at].names(names[at])]
            self._refresh(refreshed, ttl_seconds, until)
        return results

    def _refresh(self, names: Sequence[bytes], ttl_seconds: int, until: float) -> None:
        """Start the time of ``names`` anew. What has been read is a hit whether or not that succeeds: a replica may
        have answered while there is no master."""
        if names:
            attempt(self._topology, Count(b"EXPIRE", names, (b"%d" % ttl_seconds,)), until)

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`. Parts of what is split are written before the manifest that names them.

        The metadata is for people: when only it is refused, the frame is stored none the less.

        Raises:
            TierFull: a server is out of memory and evicts nothing, or a frame would have too many parts.
            TierPartlyUnavailable: those who are to have some of the frames are down, others are not.
            ValueError: not a key.
        """
        entries = [self._entry(key, frame) for key, frame in zip(keys, frames, strict=True)]
        if not entries:
            return
        until = self._topology.limits.deadline()
        ttl_seconds = self.options.ttl_seconds  # may be changed at any time
        failed = write_parts(self._topology, entries, ttl_seconds, until)
        whole = [entry for entry in entries if entry.value_name not in failed]
        outcomes = self._set(whole, ttl_seconds, until)
        self._raise_unless_done([*failed.values(), *outcomes])

    def _entry(self, key: str, frame: memoryview) -> Entry:
        limit = self.options.max_value_bytes
        manifest = Manifest.of(frame, limit) if must_split(frame, limit) else None
        num_parts = manifest.num_parts if manifest else 0
        if num_parts > MAX_PARTS:
            raise TierFull(
                f"a frame of {len(frame)} bytes has more than {MAX_PARTS} parts of max_value_bytes"
            )
        fields = metadata(key, frame, num_parts=num_parts)
        return Entry(self._value_name(key), self._metadata_name(key), frame, fields, manifest)

    def _set(self, entries: Sequence[Entry], ttl_seconds: int | None, until: float) -> list[Outcome]:
        """Put frames (or manifests) and metadata in place, all with one time to live; what became of the former.

        Parts that nobody refers to then are dropped: of an entry that was replaced, or of one that was not set.
        """
        if not entries:
            return []
        # What is replaced may have been split; without the setting none of ours was. Asked in the same pipeline, so
        # that another writer would have to come between two commands that the server has side by side.
        peeks = self.options.max_value_bytes < MAX_BULK_BYTES or any(entry.manifest for entry in entries)
        steps = [step for entry in entries for step in _steps(entry, ttl_seconds, peeks=peeks)]
        names, commands = zip(*steps, strict=True)
        outcomes = exchange(self._topology, Commands(names, commands), until)
        width = len(steps) // len(entries)
        if not peeks:
            return outcomes[::width]
        orphans: list[bytes] = []
        for entry, before, outcome in zip(entries, outcomes[::width], outcomes[1::width], strict=True):
            left = manifest_in(before) if outcome == b"OK" else entry.manifest
            if left is not None:
                orphans += left.names(entry.value_name)
        unlink(self._topology, orphans, until)
        return outcomes[1::width]

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`. Memory is freed by the server in the background."""
        if not keys:
            return 0
        until = self._topology.limits.deadline()
        values = [self._value_name(key) for key in keys]
        names = [*values, *map(self._metadata_name, keys)]
        for name, manifest in find_manifests(self._topology, values, until).items():
            names += manifest.names(name)
        outcomes = exchange(self._topology, Count(b"UNLINK", names), until)
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
                    if key.startswith(prefix) and is_own_key(key) and key not in seen:
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
        budgets = [_number(fields, "maxmemory") for fields in found]
        return TierStats(
            used_bytes=sum(_number(fields, "used_memory") for fields in found),
            budget_bytes=sum(budgets) if all(budgets) else None,
        )

    @property
    def ttl_seconds(self) -> int | None:
        return self.options.ttl_seconds

    def set_ttl(self, seconds: int | None) -> None:
        self.options = msgspec.structs.replace(self.options, ttl_seconds=seconds)

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


def _steps(entry: Entry, ttl_seconds: int | None, *, peeks: bool) -> list[tuple[bytes, Sequence[Buffer]]]:
    """Names and commands that put one entry in place; as many for each."""
    value, metadata_name = entry.value_name, entry.metadata_name
    steps: list[tuple[bytes, Sequence[Buffer]]] = [(value, [peek(value)])] if peeks else []
    steps.append((value, set_command(value, entry.value, ttl_seconds)))
    steps.append((metadata_name, [command(b"HSET", metadata_name, *entry.metadata)]))
    if ttl_seconds is not None:
        steps.append((metadata_name, [command(b"EXPIRE", metadata_name, b"%d" % ttl_seconds)]))
    return steps


def _number(fields: Mapping[str, str], name: str) -> int:
    """A number of INFO; 0 when the server does not say it, or says something else."""
    text = fields.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 20 else 0


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
