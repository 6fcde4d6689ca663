"""What a batch of names is on one connection: the pipelines, without a choice of server.

A request has one command, and takes one reply, for each of its names (names of Redis entries, bytes). ``send``
sends all commands (or a first window of them), ``receive`` takes every reply; an error reply is a value, so that
the connection stays in order whatever the server refuses. ``pick`` is the same request for some of the names:
Cluster, Sentinel and several servers differ only in which server gets which.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Protocol, Self, TypeAlias

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.redis.resp import Connection, ErrorReply, Reply, TooLong, command
from kvstrata.types import Buffer

WINDOW_BYTES = 8 << 20
"""Values asked for ahead of their reading; bounds what the server holds for one connection.

Measured with frames of 6 MB: Redis 7 copies each reply to fresh memory, so that 16 MiB ahead read at 0.8 and
64 MiB at 0.6 of the speed of 8 MiB; Valkey 9 does not care.
"""

Answer: TypeAlias = "Reply | TooLong"


class Request(Protocol):
    """A batch of commands, one for each name."""

    @property
    def names(self) -> Sequence[bytes]: ...
    @property
    def is_write(self) -> bool:
        """Whether only a master can do it."""
        ...

    def pick(self, positions: Sequence[int]) -> Self: ...

    def send(self, connection: Connection) -> None: ...

    def receive(self, connection: Connection) -> Sequence[Answer]: ...


@dataclass(frozen=True)
class Count:
    """Commands whose reply is a number: EXISTS, UNLINK, EXPIRE."""

    verb: bytes
    names: Sequence[bytes]
    arguments: tuple[bytes, ...] = ()
    """After the name."""

    @property
    def is_write(self) -> bool:
        return self.verb != b"EXISTS"

    def pick(self, positions: Sequence[int]) -> Self:
        return replace(self, names=[self.names[at] for at in positions])

    def send(self, connection: Connection) -> None:
        # One template for all names: half the time of `command` for each, and 2,000 keys are asked for at once.
        count, size = 2 + len(self.arguments), len(self.verb)
        head = b"*%d\r\n$%d\r\n%b\r\n" % (count, size, self.verb)
        tail = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in self.arguments)
        commands = [b"%b$%d\r\n%b\r\n%b" % (head, len(name), name, tail) for name in self.names]
        connection.send([b"".join(commands)])

    def receive(self, connection: Connection) -> Sequence[Answer]:
        return connection.integers(len(self.names))


@dataclass(frozen=True)
class Get:
    """Each value to the start of its buffer; the reply is its size, or None when there is no such name."""

    names: Sequence[bytes]
    buffers: Sequence[memoryview]
    is_write: bool = False

    def pick(self, positions: Sequence[int]) -> Self:
        names = [self.names[at] for at in positions]
        return replace(self, names=names, buffers=[self.buffers[at] for at in positions])

    @cached_property
    def _ends(self) -> list[int]:
        """Where each buffer would end if they lay one after the other."""
        return list(accumulate(map(len, self.buffers)))

    def _window_end(self, first: int) -> int:
        """Up to which name is asked for while ``first`` is being read: at least for that itself."""
        start = self._ends[first - 1] if first else 0
        return max(first + 1, bisect_right(self._ends, start + WINDOW_BYTES))

    def _ask(self, connection: Connection, first: int, last: int) -> None:
        if first < last:
            connection.send([b"".join([command(b"GET", name) for name in self.names[first:last]])])

    def send(self, connection: Connection) -> None:
        self._ask(connection, 0, self._window_end(0))

    def receive(self, connection: Connection) -> Sequence[Answer]:
        answers: list[Answer] = []
        asked = self._window_end(0)
        for at, buffer in enumerate(self.buffers):
            following = max(asked, self._window_end(at))
            self._ask(connection, asked, following)
            asked = following
            answers.append(connection.bulk_into(buffer))
        return answers


@dataclass(frozen=True)
class Commands:
    """Any commands whose replies are small; each is given as its bytes on the wire, in pieces."""

    names: Sequence[bytes]
    commands: Sequence[Sequence[Buffer]]
    is_write: bool = True

    def pick(self, positions: Sequence[int]) -> Self:
        names = [self.names[at] for at in positions]
        return replace(self, names=names, commands=[self.commands[at] for at in positions])

    def send(self, connection: Connection) -> None:
        connection.send([piece for pieces in self.commands for piece in pieces])

    def receive(self, connection: Connection) -> Sequence[Answer]:
        return [connection.reply() for _ in self.names]


def set_command(name: bytes, value: memoryview, ttl_seconds: int | None) -> list[Buffer]:
    """SET, with the value where it lies."""
    expiry = [] if ttl_seconds is None else [b"EX", b"%d" % ttl_seconds]
    head = b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (3 + len(expiry), len(name), name, len(value))
    tail = b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in expiry)
    return [head, value, tail]


def scan_page(
    connection: Connection, cursor: bytes, pattern: bytes
) -> tuple[bytes, list[bytes]] | ErrorReply:
    """Some names that match a glob pattern, and the cursor to go on with (``0`` at the end).

    Raises:
        TierUnavailable: the reply is not one of SCAN.
    """
    connection.send([command(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"1000")])
    match connection.reply():
        case ErrorReply() as error:
            return error
        case [bytes() as following, list() as names]:
            return following, [name for name in names if isinstance(name, bytes)]
        case _:
            raise TierUnavailable("the server broke the protocol: SCAN gave no cursor and keys")
