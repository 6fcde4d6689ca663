"""What goes over an ``lm://`` connection: messages and limits, without I/O. All integers are little-endian.

Two languages. The *plain* one is that of LMCache 0.5.6 (``lmcache/v1/protocol.py``): requests of 186 bytes,
replies of 36, one key each; a PUT is not answered. The *extended* one has batches, a status for every write,
checksums, times to live, deletion and scans. A connection begins plain. A HEALTH request with a key that says hello
switches it over, if the server's answer says so too; LMCache's server takes it for any other HEALTH request
(docs/remote-server.md).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec
import xxhash

from kvstrata.errors import ProtocolError
from kvstrata.types import Buffer

# -- the plain language

PLAIN_KEY_BYTES = 150
"""The longest key of a plain request."""
MAX_LENGTH = 2**31 - 1
"""Lengths are signed 32 bit integers."""
OK = 200
FAIL = 400
_REQUEST = struct.Struct(f"<9i{PLAIN_KEY_BYTES}s")
_REPLY = struct.Struct("<9i")
REQUEST_BYTES = _REQUEST.size
REPLY_BYTES = _REPLY.size


class Command(enum.IntEnum):
    """Commands of a plain request."""

    PUT = 1
    GET = 2
    EXIST = 3
    LIST = 4
    HEALTH = 5


class Form(msgspec.Struct, frozen=True):
    """What LMCache says of a value besides its bytes; a server keeps it and gives it back as it was."""

    format: int = 5
    """``MemoryFormat``: 5 is BINARY_BUFFER, 4 BINARY, 1 the tensors of LMCache's default."""
    dtype: int = 6
    """6 is uint8, 0 none."""
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    location: int = 0


FRAME_FORMAT = 5
"""BINARY_BUFFER: a frame of kvstrata in a server of LMCache."""
DELETED_FORMAT = 4
"""BINARY: a frame of kvstrata that was deleted there, which is done by replacing it with nothing."""
NOTHING = Form(format=1, dtype=2)
"""What replies without a value carry, as LMCache's server sends them."""


class Request(msgspec.Struct, frozen=True):
    """A plain request; ``length`` bytes follow a PUT."""

    command: int
    key: bytes
    length: int = 0
    form: Form = NOTHING

    def pack(self) -> bytes:
        """The 186 bytes. The key must not be longer than :data:`PLAIN_KEY_BYTES`."""
        form = self.form
        key = self.key.ljust(PLAIN_KEY_BYTES)
        return _REQUEST.pack(
            self.command, self.length, form.format, form.dtype, form.location, *form.shape, key
        )

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Read 186 bytes.

        Raises:
            ProtocolError: no command of the protocol, or a negative length.
        """
        command, length, kind, dtype, location, *shape, key = _REQUEST.unpack(data)
        if not Command.PUT <= command <= Command.HEALTH:
            raise ProtocolError(f"no command has the number {command}")
        if length < 0:
            raise ProtocolError(f"a length of {length}")
        return cls(command, key.strip(), length, Form(kind, dtype, tuple(shape), location))


class Reply(msgspec.Struct, frozen=True):
    """A plain reply; ``length`` bytes follow."""

    code: int
    length: int = 0
    form: Form = NOTHING

    def pack(self) -> bytes:
        form = self.form
        return _REPLY.pack(self.code, self.length, form.format, form.dtype, *form.shape, form.location)

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Read 36 bytes.

        Raises:
            ProtocolError: neither success nor failure, a negative length, or a failure with bytes.
        """
        code, length, kind, dtype, *shape, location = _REPLY.unpack(data)
        if code not in (OK, FAIL) or length < 0 or (code == FAIL and length):
            raise ProtocolError(f"a reply with code {code} and length {length}")
        return cls(code, length, Form(kind, dtype, tuple(shape), location))


def plain_key(key: str) -> bytes:
    """The name of ``key`` in a server that speaks the plain language only.

    LMCache's server takes keys apart and hangs up on those that are not of its form, which is
    ``model@world_size@worker_id@hash@dtype``; and they may have 150 bytes. So each key becomes its SHA-256.
    """
    return b"kvstrata@1@0@%b@uint8" % hashlib.sha256(key.encode()).hexdigest().encode()


# -- the switch from one to the other

_HELLO_KEY = b"kvstrata-hello-1@1@0@%b@uint8"
_HELLO_PREFIX, _, _HELLO_SUFFIX = _HELLO_KEY.partition(b"%b")
NONCE_BYTES = 16
_MAGIC = int.from_bytes(b"KVST", "little")
_VERSION = 1
_HELLO = struct.Struct(f"<{NONCE_BYTES}sIQ")
_WANTS_TOKEN = 1
PROOF_BYTES = 32


def hello_request(nonce: bytes) -> bytes:
    """A HEALTH request that asks for the extended language. Its key is one that LMCache can take apart."""
    return Request(Command.HEALTH, _HELLO_KEY % nonce.hex().encode()).pack()


def hello_nonce(request: Request) -> bytes | None:
    """The client's nonce, if ``request`` is one of :func:`hello_request`."""
    key = request.key
    if request.command != Command.HEALTH or not key.startswith(_HELLO_PREFIX):
        return None
    digits = key.removeprefix(_HELLO_PREFIX).removesuffix(_HELLO_SUFFIX)
    try:
        nonce = bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return None
    return nonce if len(nonce) == NONCE_BYTES else None


class Hello(msgspec.Struct, frozen=True):
    """What a server that speaks the extended language answers."""

    nonce: bytes
    wants_token: bool
    max_frame_bytes: int

    def pack(self) -> bytes:
        body = _HELLO.pack(self.nonce, _WANTS_TOKEN if self.wants_token else 0, self.max_frame_bytes)
        return Reply(OK, len(body), Form(4, 0, (_MAGIC, _VERSION, 0, 0))).pack() + body

    @classmethod
    def unpack(cls, body: Buffer) -> Self:
        nonce, flags, max_frame_bytes = _HELLO.unpack(body)
        return cls(nonce, bool(flags & _WANTS_TOKEN), max_frame_bytes)


HELLO_BYTES = _HELLO.size
"""What follows the reply to a hello."""


def says_hello(reply: Reply) -> bool:
    """Whether the reply to a hello is one of a server that speaks the extended language.

    Raises:
        ProtocolError: it speaks another version, or is no reply of either server.
    """
    magic, version, *_ = reply.form.shape
    if magic != _MAGIC:
        if reply.length:
            raise ProtocolError(f"{reply.length} bytes in the reply to a health request")
        return False
    if version != _VERSION or reply.length != HELLO_BYTES:
        raise ProtocolError(f"version {version} of the extended lm protocol; this is version {_VERSION}")
    return True


def proof(token: bytes, who: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """What shows that ``who`` ("client" or "server") has the token, without sending it: an HMAC-SHA256."""
    text = b"kvstrata lm 1 " + who + b"\0" + client_nonce + server_nonce
    return hmac.digest(token, text, "sha256")


# -- the extended language

MAX_KEY_BYTES = 8192
MAX_KEYS = 1 << 16
"""Keys of one request."""
MAX_KEYS_BYTES = 16 << 20
"""Bytes of all keys of one request, and of a page of keys."""
_CALL = struct.Struct("<BBHIIIQQ")
_ANSWER = struct.Struct("<BBHIQQ")
_ITEM = struct.Struct("<IH")
CALL_BYTES = _CALL.size
ANSWER_BYTES = _ANSWER.size
MAX_ROOM = 2**32 - 1


class Verb(enum.IntEnum):
    """What a call asks for."""

    PROVE = 16
    """That the client has the token: the payload is its proof, the answer's body the server's."""
    CONTAINS = 17
    """The answer's body has a byte per key, 1 or 0."""
    READ = 18
    """One answer per key, in order, each with the frame as its body."""
    WRITE = 19
    """One key; the payload is the frame."""
    DELETE = 20
    """The answer's number is how many were held."""
    SCAN = 21
    """Two keys: a prefix, and where to go on (empty at first). The answer's body are keys of which the first says
    where to go on (empty at the end)."""
    STATS = 22
    """The answer's body: entries, bytes used, budget; 64 bits each."""


class Status(enum.IntEnum):
    """How a call went."""

    OK = 0
    ABSENT = 1
    TOO_LARGE = 2
    """The frame is larger than the room that the client has for it, or than the server takes."""
    FULL = 3
    """No room, and nothing that could be evicted now."""
    CORRUPT = 4
    """The checksum of what was written is another one."""
    REFUSED = 5
    """A wrong proof, or a call that breaks the protocol; the body says why. The server hangs up."""


class Call(msgspec.Struct, frozen=True):
    """The head of an extended request: ``keys_bytes`` of keys follow, then ``payload_bytes``."""

    verb: int
    num_keys: int = 0
    keys_bytes: int = 0
    payload_bytes: int = 0
    ttl_seconds: int = 0
    """0: what the server is set to."""
    checksum: int = 0

    def pack(self) -> bytes:
        return _CALL.pack(
            self.verb,
            0,
            0,
            self.num_keys,
            self.keys_bytes,
            self.ttl_seconds,
            self.payload_bytes,
            self.checksum,
        )

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        """Read and check a head.

        Raises:
            ProtocolError: an unknown verb, or numbers above the limits or that do not fit each other.
        """
        verb, flags, reserved, num_keys, keys_bytes, ttl_seconds, payload_bytes, checksum = _CALL.unpack(data)
        if not Verb.PROVE <= verb <= Verb.STATS or flags or reserved:
            raise ProtocolError(f"no verb has the number {verb} and flags {flags}")
        if num_keys > MAX_KEYS or keys_bytes > MAX_KEYS_BYTES:
            raise ProtocolError(f"{num_keys} keys of {keys_bytes} bytes in one call")
        wanted_keys = {Verb.PROVE: 0, Verb.WRITE: 1, Verb.SCAN: 2, Verb.STATS: 0}.get(verb)
        if wanted_keys is not None and num_keys != wanted_keys:
            raise ProtocolError(f"{num_keys} keys with {Verb(verb).name}")
        if payload_bytes and verb not in (Verb.PROVE, Verb.WRITE):
            raise ProtocolError(f"a payload with {Verb(verb).name}")
        if verb == Verb.PROVE and payload_bytes != PROOF_BYTES:
            raise ProtocolError(f"a proof of {payload_bytes} bytes")
        return cls(verb, num_keys, keys_bytes, payload_bytes, ttl_seconds, checksum)


class Answer(msgspec.Struct, frozen=True):
    """The head of an extended reply: ``body_bytes`` follow."""

    verb: int
    status: int = Status.OK
    number: int = 0
    body_bytes: int = 0
    checksum: int = 0
    """Of the body of a READ; 0 when the frame was written without one."""

    def pack(self) -> bytes:
        return _ANSWER.pack(self.verb, self.status, 0, self.number, self.body_bytes, self.checksum)

    @classmethod
    def unpack(cls, data: Buffer) -> Self:
        verb, status, _, number, body_bytes, checksum = _ANSWER.unpack(data)
        return cls(verb, status, number, body_bytes, checksum)


def pack_keys(keys: Iterable[bytes], rooms: Iterable[int] | None = None) -> bytes:
    """Keys one after the other, each with its length and the bytes that its reader has room for (else 0)."""
    if rooms is None:
        return b"".join([_ITEM.pack(0, len(key)) + key for key in keys])
    return b"".join([_ITEM.pack(room, len(key)) + key for key, room in zip(keys, rooms, strict=True)])


def unpack_keys(data: Buffer, num_keys: int | None = None) -> list[tuple[bytes, int]]:
    """Keys and rooms.

    Raises:
        ProtocolError: the lengths do not add up, or another number of keys than announced.
    """
    view = memoryview(data)
    found: list[tuple[bytes, int]] = []
    at, end = 0, len(view)
    while at < end:
        if end - at < _ITEM.size:
            raise ProtocolError("a list of keys ends within a key")
        room, length = _ITEM.unpack_from(view, at)
        at += _ITEM.size
        if length > min(MAX_KEY_BYTES, end - at):
            raise ProtocolError(f"a key of {length} bytes in a list that has {end - at} left")
        found.append((bytes(view[at : at + length]), room))
        at += length
    if num_keys is not None and len(found) != num_keys:
        raise ProtocolError(f"{len(found)} keys where {num_keys} were announced")
    return found


def checksum(key: bytes, frame: Buffer) -> int:
    """Of a frame under its key, never 0: a frame that comes back under another key has another one."""
    return xxhash.xxh3_64_intdigest(frame, seed=xxhash.xxh3_64_intdigest(key)) or 1


_STATS = struct.Struct("<QQQ")
STATS_BYTES = _STATS.size


def pack_stats(numbers: Sequence[int]) -> bytes:
    return _STATS.pack(*numbers)


def unpack_stats(data: Buffer) -> tuple[int, int, int]:
    entries, used_bytes, budget_bytes = _STATS.unpack(data)
    return entries, used_bytes, budget_bytes
