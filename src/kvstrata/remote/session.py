"""One client of a remote server: what it sends, and what it gets for it."""

from __future__ import annotations

import asyncio
import hmac
import math
import secrets
import time
from collections.abc import Sequence

from kvstrata.errors import ProtocolError
from kvstrata.remote.service import Service
from kvstrata.remote.store import Entry
from kvstrata.remote.stream import Input, Stream
from kvstrata.tiers.lm import wire
from kvstrata.tiers.lm.wire import Answer, Call, Command, Form, Reply, Request, Status, Verb
from kvstrata.types import Buffer

_FLUSH_BYTES = 256 << 10
"""Small answers are sent together, up to about this."""
_FLUSH_PARTS = 256
_TURN = 16
"""Messages of one client after which others have their turn in any case."""
_NEVER = math.inf


class Session:
    """Reads messages one after the other and answers them. ``run`` ends when the client or the server does.

    ``busy`` says whether a message is being worked on; between messages the task may be cancelled without loss.
    """

    def __init__(self, service: Service, stream: Stream, peer: str) -> None:
        self._service = service
        self._options = service.options
        self._stream = stream
        self._input = Input(stream)
        self._peer = peer
        self._nonces = (b"", b"")
        self._extended = False
        self._trusted = not service.options.token
        self.busy = False
        self.deadline = _NEVER
        """When the client must have sent or taken what is waited for, on the clock ``time.monotonic``. A timer for
        each wait would cost more than the rest of a small message."""

    async def run(self) -> None:
        """Serve until the connection ends. Raises nothing but what cancels it."""
        served = 0
        try:
            while not self._service.draining and await self._wait():
                self.busy = True
                if self._extended:
                    await self._serve_call()
                else:
                    await self._serve_request()
                self.busy = False
                served += 1
                if served % _TURN == 0:
                    await asyncio.sleep(0)  # a client that never lets the socket run dry is not the only one
        except ProtocolError as error:
            self._service.complain(f"{self._peer} is hung up on: {error}")
        except asyncio.CancelledError:
            if not self.is_late():
                raise
            self._service.complain(f"{self._peer} is hung up on: it is too slow")
        except OSError:
            pass  # it is gone
        finally:
            self.busy = False
            self.deadline = _NEVER
            self._stream.close()

    def is_late(self) -> bool:
        """Whether the client has not done in time what it is waited for. Whoever finds that cancels the task."""
        return self.deadline < time.monotonic()

    async def _wait(self) -> bool:
        if not self._trusted:
            self._allow(0)
        return await self._input.wait()

    def _allow(self, num_bytes: int) -> None:
        """Give the client the time for a message, or part of one, of that many bytes, from now on."""
        seconds = self._options.message_seconds + num_bytes / self._options.min_bytes_per_second
        self.deadline = time.monotonic() + seconds

    async def _send(self, parts: Sequence[Buffer], num_bytes: int = 0) -> None:
        self._allow(num_bytes)
        await self._stream.send(parts)
        self.deadline = _NEVER

    async def _receive(self, key: bytes, size: int) -> Entry | Status:
        """An entry with the ``size`` bytes that come next; if there is none, they are dropped."""

        async def fill(view: memoryview) -> None:
            self._allow(size)
            await self._input.into(view)
            self.deadline = _NEVER

        self.deadline = _NEVER  # others may be before it; that is not its fault
        received = await self._service.receive(key, size, fill)
        if not isinstance(received, Entry):
            self._allow(size)
            await self._input.drop(size)
            self.deadline = _NEVER
        return received

    # -- the plain language

    async def _serve_request(self) -> None:
        self._allow(0)
        request = Request.unpack(await self._input.take(wire.REQUEST_BYTES))
        self.deadline = _NEVER
        nonce = wire.hello_nonce(request) if self._options.extensions else None
        if nonce is not None:
            await self._greet(nonce)
            return
        if not self._trusted:
            raise ProtocolError("it does not show that it has the token (clients of LMCache cannot)")
        match request.command:
            case Command.PUT:
                await self._put(request)
            case Command.GET:
                await self._get(request.key)
            case Command.EXIST:
                code = wire.OK if self._service.contains(request.key) else wire.FAIL
                await self._send([Reply(code).pack()])
            case Command.LIST if self._options.extensions:
                await self._list()
            case Command.LIST:
                return  # LMCache's server does not answer it
            case _:
                await self._send([Reply(wire.OK).pack()])

    async def _greet(self, nonce: bytes) -> None:
        self._nonces = (nonce, secrets.token_bytes(wire.NONCE_BYTES))
        hello = wire.Hello(self._nonces[1], bool(self._options.token), self._options.max_frame_bytes)
        await self._send([hello.pack()])
        self._extended = True

    async def _put(self, request: Request) -> None:
        entry = await self._receive(request.key, request.length)
        if isinstance(entry, Entry):
            entry.form = request.form
            self._service.commit(entry, 0)

    async def _get(self, key: bytes) -> None:
        entry = await self._service.find(key)
        if entry is None:
            await self._send([Reply(wire.FAIL).pack()])
            return
        try:
            value = self._service.store.value(entry)
            await self._send([Reply(wire.OK, entry.size, entry.form).pack(), value], entry.size)
        finally:
            self._service.store.unpin(entry)

    async def _list(self) -> None:
        keys, room = [], self._options.max_frame_bytes
        for key in self._service.held_keys():
            room -= len(key) + 1
            if room < 0:
                break
            keys.append(key)
        taken = await self._service.take_keys(len(keys), self._options.max_frame_bytes - room)
        try:
            body = b"\n".join(keys)
            await self._send(
                [Reply(wire.OK, len(body), Form(4, 0, (len(body), 0, 0, 0))).pack(), body], len(body)
            )
        finally:
            self._service.keys_in_flight.give_back(taken)

    # -- the extended language

    async def _serve_call(self) -> None:
        keys_bytes = 0
        try:
            self._allow(0)
            call = Call.unpack(await self._input.take(wire.CALL_BYTES))
            if not self._trusted:
                await self._check_proof(call)
                return
            self.deadline = _NEVER  # others may be before it; that is not its fault
            keys_bytes = await self._service.take_keys(call.num_keys, call.keys_bytes)
            self._allow(call.keys_bytes)
            keys = wire.unpack_keys(await self._input.take(call.keys_bytes), call.num_keys)
            self.deadline = _NEVER
            await self._answer(call, keys)
        except ProtocolError as error:
            text = str(error).encode()
            await self._send([Answer(0, Status.REFUSED, 0, len(text)).pack(), text])
            raise
        finally:
            if keys_bytes:
                self._service.keys_in_flight.give_back(keys_bytes)

    async def _check_proof(self, call: Call) -> None:
        if call.verb != Verb.PROVE or call.keys_bytes:
            raise ProtocolError("a token is wanted")
        token = self._options.token
        expected = wire.proof(token, b"client", *self._nonces)
        if not hmac.compare_digest(await self._input.take(wire.PROOF_BYTES), expected):
            raise ProtocolError("wrong token")
        self._trusted = True
        mine = wire.proof(token, b"server", *self._nonces)
        await self._send([Answer(Verb.PROVE, body_bytes=len(mine)).pack(), mine])

    async def _answer(self, call: Call, keys: list[tuple[bytes, int]]) -> None:
        service = self._service
        match call.verb:
            case Verb.CONTAINS:
                held = bytes([service.contains(key) for key, _ in keys])
                await self._send([Answer(Verb.CONTAINS, number=len(held), body_bytes=len(held)).pack(), held])
            case Verb.READ:
                await self._read(keys)
            case Verb.WRITE:
                await self._write(call, keys[0][0])
            case Verb.DELETE:
                count = await service.delete([key for key, _ in keys])
                await self._send([Answer(Verb.DELETE, number=count).pack()])
            case Verb.SCAN:
                await self._scan(keys[0][0], keys[1][0])
            case Verb.STATS:
                body = wire.pack_stats(service.stats())
                await self._send([Answer(Verb.STATS, body_bytes=len(body)).pack(), body])
            case _:
                raise ProtocolError("the token has been proven, or none is wanted")

    async def _read(self, keys: list[tuple[bytes, int]]) -> None:
        store = self._service.store
        parts: list[Buffer] = []
        pinned: list[Entry] = []
        num_bytes = 0
        try:
            for key, room in keys:
                entry = await self._service.find(key)
                if entry is None:
                    parts.append(Answer(Verb.READ, Status.ABSENT).pack())
                    continue
                pinned.append(entry)
                if entry.size > room:
                    parts.append(Answer(Verb.READ, Status.TOO_LARGE, entry.size).pack())
                else:
                    head = Answer(Verb.READ, body_bytes=entry.size, checksum=entry.checksum)
                    parts += [head.pack(), store.value(entry)]
                    num_bytes += entry.size
                if num_bytes >= _FLUSH_BYTES or len(parts) >= _FLUSH_PARTS:
                    await self._send(parts, num_bytes)
                    parts, num_bytes = [], 0
                    while pinned:
                        store.unpin(pinned.pop())
            await self._send(parts, num_bytes)
        finally:
            for entry in pinned:
                store.unpin(entry)

    async def _write(self, call: Call, key: bytes) -> None:
        received = await self._receive(key, call.payload_bytes)
        status = Status.OK
        if not isinstance(received, Entry):
            status = received
        elif call.checksum and wire.checksum(key, self._service.store.value(received)) != call.checksum:
            self._service.store.abort(received)
            status = Status.CORRUPT
        else:
            received.checksum = call.checksum
            self._service.commit(received, call.ttl_seconds)
        await self._send([Answer(Verb.WRITE, status).pack()])

    async def _scan(self, prefix: bytes, cursor: bytes) -> None:
        page = self._service.scan_page(prefix, cursor)
        if page is None:
            await self._send([Answer(Verb.SCAN, Status.ABSENT).pack()])
            return
        following, keys = page
        body = wire.pack_keys([following, *keys])
        await self._send([Answer(Verb.SCAN, body_bytes=len(body)).pack(), body], len(body))
