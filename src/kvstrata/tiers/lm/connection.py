"""One connection to an lm server: the switch of languages, proofs, and pieces of messages."""

from __future__ import annotations

import hmac
import secrets
import socket

from kvstrata.errors import ProtocolError, TierUnavailable
from kvstrata.tiers.lm import wire
from kvstrata.tiers.sockets import DeadlineSocket

MAX_REASON_BYTES = 1024
_DROP_BYTES = 1 << 16
_STATUSES = frozenset(map(int, wire.Status))


class Connection(DeadlineSocket):
    """A connected socket with ``lm://`` on it. Used by one thread at a time; see :class:`DeadlineSocket`."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        super().__init__(sock, name)
        self.hello: wire.Hello | None = None
        """What the server said of itself; None for one that speaks the plain language only."""

    def introduce(self, token: bytes) -> None:
        """Find out which language the server speaks; show that we have the token, and see that it has it too.

        Raises:
            TierUnavailable: the server wants a token, has another one, or has none although we have.
        """
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self.send([wire.hello_request(nonce)])
        reply = self.plain_reply()
        if reply.code != wire.OK:
            raise self.violated("it says that it is not healthy")
        try:
            if wire.says_hello(reply):
                self.hello = wire.Hello.unpack(self.body(wire.HELLO_BYTES))
        except ProtocolError as error:
            raise self.violated(str(error)) from error
        if self.hello is None or not self.hello.wants_token:
            if token:
                raise self.refused(
                    "it knows no token; leave it out of the URL, or start it with --token-file"
                )
            return
        if not token:
            raise self.refused("it wants a token, as in lm://:TOKEN@host:port")
        self._prove(token, nonce, self.hello.nonce)

    def _prove(self, token: bytes, ours: bytes, theirs: bytes) -> None:
        mine = wire.proof(token, b"client", ours, theirs)
        self.send([wire.Call(wire.Verb.PROVE, payload_bytes=len(mine)).pack(), mine])
        answer = self.answer(wire.Verb.PROVE)
        if answer.body_bytes != wire.PROOF_BYTES:
            raise self.violated("no proof of its token")
        if not hmac.compare_digest(self.body(wire.PROOF_BYTES), wire.proof(token, b"server", ours, theirs)):
            raise self.refused("it does not have our token")

    def plain_reply(self) -> wire.Reply:
        """Take the head of a plain reply."""
        try:
            return wire.Reply.unpack(self.body(wire.REPLY_BYTES))
        except ProtocolError as error:
            raise self.violated(str(error)) from error

    def answer(self, verb: wire.Verb) -> wire.Answer:
        """Take the head of an extended reply to ``verb``; one that refuses is raised."""
        answer = wire.Answer.unpack(self.body(wire.ANSWER_BYTES))
        if answer.status == wire.Status.REFUSED:
            reason = self.body(min(answer.body_bytes, MAX_REASON_BYTES)).decode("utf-8", "replace")
            raise self.refused(reason)
        if answer.verb != verb or answer.status not in _STATUSES:
            raise self.violated(f"an answer to {answer.verb} with status {answer.status}, not to {verb.name}")
        return answer

    def keys(self, num_bytes: int) -> list[bytes]:
        """Take a list of keys."""
        if num_bytes > 2 * wire.MAX_KEYS_BYTES:
            raise self.violated(f"{num_bytes} bytes of keys")
        try:
            return [key for key, _ in wire.unpack_keys(self.body(num_bytes))]
        except ProtocolError as error:
            raise self.violated(str(error)) from error

    def body(self, num_bytes: int) -> bytearray:
        """Take ``num_bytes``, which the caller has checked."""
        data = bytearray(num_bytes)
        with memoryview(data) as view:
            self.receive_all(view)
        return data

    def drop(self, num_bytes: int) -> None:
        """Receive ``num_bytes`` and forget them."""
        view = memoryview(bytearray(min(num_bytes, _DROP_BYTES)))
        while num_bytes:
            num_bytes -= self.receive(view[: min(num_bytes, _DROP_BYTES)])

    def refused(self, reason: str) -> TierUnavailable:
        """Close, and make the exception for a server that will not serve us."""
        self.close()
        return TierUnavailable(f"{self._name}: refused: {reason}")
