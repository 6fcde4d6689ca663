"""One connection that speaks RESP2, made for values of megabytes.

Values go from and to the caller's memory without a copy in between (:mod:`kvstrata.tiers.sockets`). Every length
that the server names is checked against a limit before anything is allocated or received for it.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from kvstrata.tiers.sockets import DeadlineSocket

MAX_BULK_BYTES = 512 << 20
"""The longest string of Redis."""
MAX_REPLY_BYTES = 16 << 20
"""The longest reply that is taken as a value (INFO, SCAN, HGETALL); frames are read by ``bulk_into``."""
MAX_LINE_BYTES = 1024
MAX_ITEMS = 1 << 16
MAX_DEPTH = 4
INPUT_BYTES = 64 << 10

_CRLF = b"\r\n"


class ErrorReply(msgspec.Struct, frozen=True):
    """The server refused a command. The connection is in order."""

    text: str

    @property
    def code(self) -> str:
        """The first word: ERR, OOM, NOAUTH, LOADING, READONLY, WRONGTYPE ..."""
        return self.text.partition(" ")[0]


class TooLong(msgspec.Struct, frozen=True):
    """A value that did not fit its buffer, and was dropped. The connection is in order."""

    size: int


Reply: TypeAlias = "int | bytes | ErrorReply | list[Reply] | None"
"""What a reply is in Python; simple strings and bulk strings are both bytes, null is None."""


def command(*arguments: bytes) -> bytes:
    """A command as it goes over the wire."""
    parts = [b"*%d\r\n" % len(arguments)]
    parts += [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments]
    return b"".join(parts)


class Connection:
    """A connected socket with RESP2 on it. Used by one thread at a time.

    ``start`` sets a deadline; every method ends by then. Those that send or receive raise
    :class:`TierUnavailable` when the peer is gone, late, or breaks the protocol; the connection is closed
    then.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._socket = DeadlineSocket(sock, name)
        self._input = bytearray(INPUT_BYTES)
        self._view = memoryview(self._input)
        self._at = 0
        self._end = 0
        self.start = self._socket.start
        self.send = self._socket.send
        self.close = self._socket.close
        self.fileno = self._socket.fileno

    @property
    def closed(self) -> bool:
        return self._socket.closed

    @property
    def idle(self) -> bool:
        """Whether all that was received has been taken."""
        return self._at == self._end

    # -- receiving

    def bulk_into(self, buffer: memoryview) -> int | ErrorReply | TooLong | None:
        """Take a reply that is a bulk string, straight into ``buffer``; return its size, None when null."""
        line = self._line()
        if line[:1] == b"-":
            return _error(line)
        if line[:1] != b"$":
            raise self._socket.violated("a value was expected")
        size = self._number(line, MAX_BULK_BYTES)
        if size < 0:
            return None
        if size > len(buffer):
            self._drop(size)
            self._expect_crlf()
            return TooLong(size)
        taken = min(size, self._end - self._at)
        buffer[:taken] = self._view[self._at : self._at + taken]
        self._at += taken
        while taken < size:
            taken += self._socket.receive(buffer[taken:size])
        self._expect_crlf()
        return size

    def reply(self) -> Reply:
        """Take one reply of any type."""
        return self._reply(MAX_DEPTH, [MAX_REPLY_BYTES, MAX_ITEMS])

    def _reply(self, depth: int, room: list[int]) -> Reply:
        """One reply; ``room`` are the bytes and items that it may still take."""
        line = self._line()
        match line[:1]:
            case b"+":
                return line[1:]
            case b"-":
                return _error(line)
            case b":":
                return self._number(line, (1 << 63) - 1)
            case b"$":
                size = self._number(line, room[0])
                room[0] -= max(size, 0)
                return None if size < 0 else self._bulk(size)
            case b"*":
                count = self._number(line, room[1])
                room[1] -= max(count, 0)
                if depth == 0:
                    raise self._socket.violated("arrays in arrays in arrays")
                return None if count < 0 else [self._reply(depth - 1, room) for _ in range(count)]
            case _:
                raise self._socket.violated("a reply of no known type")

    def integers(self, count: int) -> list[int | ErrorReply]:
        """Take ``count`` replies that are integers (or errors); fast for those of one digit."""
        values: list[int | ErrorReply] = []
        while len(values) < count:
            self._fill()
            ready = min((self._end - self._at) // 4, count - len(values))
            data = self._input[self._at : self._at + 4 * ready]
            if ready and data[0::4] + data[2::4] + data[3::4] == b":" * ready + b"\r" * ready + b"\n" * ready:
                digits = data[1::4]
                if digits.isdigit():
                    values += [digit - 48 for digit in digits]
                    self._at += 4 * ready
                    continue
            value = self.reply()
            if not isinstance(value, int | ErrorReply):
                raise self._socket.violated("a number was expected")
            values.append(value)
        return values

    def _bulk(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._fill()
            piece = self._view[self._at : min(self._end, self._at + size - len(data))]
            data += piece
            self._at += len(piece)
        self._expect_crlf()
        return bytes(data)

    def _drop(self, size: int) -> None:
        while size:
            self._fill()
            step = min(size, self._end - self._at)
            self._at += step
            size -= step

    def _line(self) -> bytes:
        """The next line, without its end."""
        while True:
            stop = self._input.find(_CRLF, self._at, min(self._end, self._at + MAX_LINE_BYTES))
            if stop >= 0:
                line = bytes(self._view[self._at : stop])
                self._at = stop + 2
                return line
            if self._end - self._at >= MAX_LINE_BYTES:
                raise self._socket.violated("an endless line")
            self._more()

    def _expect_crlf(self) -> None:
        while self._end - self._at < 2:
            self._more()
        if self._view[self._at : self._at + 2] != _CRLF:
            raise self._socket.violated("a value of another length than announced")
        self._at += 2

    def _number(self, line: bytes, limit: int) -> int:
        """The number in a line, between -1 (or minus the limit for integers) and ``limit``."""
        text = line[1:]
        if not text.removeprefix(b"-").isdigit() or len(text) > 20:
            raise self._socket.violated("no number where one belongs")
        value = int(text)
        lowest = -limit - 1 if line[:1] == b":" else -1
        if not lowest <= value <= limit:
            raise self._socket.violated(f"a length of {value}, allowed are {limit}")
        return value

    def _fill(self) -> None:
        """Have at least one byte in the input buffer."""
        if self._at == self._end:
            self._more()

    def _more(self) -> None:
        """Receive what there is to the input buffer."""
        if self._at:
            self._view[: self._end - self._at] = self._view[self._at : self._end]
            self._end -= self._at
            self._at = 0
        self._end += self._socket.receive(self._view[self._end :], whole=False)


def _error(line: bytes) -> ErrorReply:
    return ErrorReply(line[1:].decode("utf-8", "replace"))
