"""One request to all the servers that have a part in it: sent to each, then answered by each, in one round trip."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from kvstrata.errors import TierUnavailable
from kvstrata.tiers.connections import Busy
from kvstrata.tiers.redis.batch import Answer, Request
from kvstrata.tiers.redis.login import masked
from kvstrata.tiers.redis.resp import Connection, ErrorReply, command
from kvstrata.tiers.redis.server import REJOIN_CODES, Server
from kvstrata.tiers.redis.topology import Again, Ask, Topology
from kvstrata.tiers.sockets import fair_share

MAX_ROUNDS = 4
"""How often a name is routed: redirections that contradict each other must end."""
DOWN_CODES = frozenset({"NOAUTH", "WRONGPASS", "LOADING", "MASTERDOWN", "CLUSTERDOWN"})
"""Errors by which a server says that it does not serve now, whatever the command."""


class Down(msgspec.Struct, frozen=True):
    """No answer: whoever has this name cannot be reached, or does not serve now."""

    reason: str


class Refused(msgspec.Struct, frozen=True):
    """One command was refused, and by whom."""

    server: Server
    reply: ErrorReply


Outcome: TypeAlias = "Answer | Down | Refused"


@dataclass
class _Leg:
    """The part of a request that one server answers."""

    server: Server
    positions: Sequence[int]
    """In the whole request."""
    request: Request
    connection: Connection
    answers: Sequence[Answer] = ()
    failure: str = ""
    """Why there are no answers."""
    is_lost: bool = False
    """Whether the failure is the server's: it may also never have got its turn."""


def exchange(topology: Topology, request: Request, until: float | None = None) -> list[Outcome]:
    """What the servers answer for each name. Ends within the deadlines for connecting and for one batch together,
    or at ``until`` (monotonic), which the requests of a batch that takes several have in common.

    Raises:
        TierUnavailable: there is no server at all.
    """
    until = topology.limits.deadline() if until is None else until
    return _Exchange(topology, request, until).run()


def attempt(topology: Topology, request: Request, until: float) -> None:
    """Have it done if it can be: for what comes after a read or a write that has succeeded."""
    with contextlib.suppress(TierUnavailable):
        exchange(topology, request, until)


class _Exchange:
    def __init__(self, topology: Topology, request: Request, until: float) -> None:
        self._topology = topology
        self._request = request
        self._timeout_seconds = topology.limits.timeout_seconds
        self._until = until
        self._deadline = until
        # Another round is worth it after a refusal, not after a wait.
        self._last_round_at = time.monotonic() + self._timeout_seconds / 2
        self._outcomes: list[Outcome] = [Down("the batch's time was over")] * len(request.names)

    def run(self) -> list[Outcome]:
        pending: Sequence[int] = range(len(self._request.names))
        for number in range(MAX_ROUNDS):
            last_at = self._last_round_at if number else self._until
            if not pending or time.monotonic() > last_at:
                break
            pending = self._round(pending)
        return self._outcomes

    def _round(self, pending: Sequence[int]) -> list[int]:
        """Ask for the names at ``pending``; return those that are to be routed once more."""
        legs: list[_Leg] = []
        try:
            again = self._open(pending, legs)
            for leg in legs:
                self._attempt(leg, _send)
            self._receive([leg for leg in legs if not leg.failure])
        finally:
            for leg in legs:
                _release(leg)
        for leg in legs:
            again += self._settle(leg)
        return sorted(again)

    def _open(self, pending: Sequence[int], legs: list[_Leg]) -> list[int]:
        """Fill ``legs``, each with its connection; return the names that are to be routed once more."""
        is_all = len(pending) == len(self._outcomes)
        names = self._request.names if is_all else [self._request.names[at] for at in pending]
        again: list[int] = []
        routes = self._topology.route(names, is_write=self._request.is_write)
        for number, route in enumerate(routes):
            positions = route.positions if is_all else [pending[at] for at in route.positions]
            if route.server is None:
                self._miss(positions, route.reason)
                continue
            try:
                connection = route.server.acquire(fair_share(self._until, len(routes) - number))
            except TierUnavailable as error:
                self._miss(positions, str(error))
                if not isinstance(error, Busy) and self._topology.lost(route.server, str(error)):
                    again += positions
                continue
            is_whole = len(positions) == len(self._outcomes)
            part = self._request if is_whole else self._request.pick(positions)
            legs.append(_Leg(route.server, positions, part, connection))
        self._deadline = min(self._until, time.monotonic() + self._timeout_seconds)
        for leg in legs:
            leg.connection.start(self._deadline - time.monotonic())
        return again

    def _receive(self, legs: list[_Leg]) -> None:
        """Take the answers in the order in which they come: who hangs keeps nobody else's."""
        waiting = {leg.connection.fileno(): leg for leg in legs}
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        while len(waiting) > 1:
            ready = poll.poll(max(self._deadline - time.monotonic(), 0) * 1000)
            if not ready:
                break
            for descriptor, _ in ready:
                poll.unregister(descriptor)
                self._attempt(waiting.pop(descriptor), _receive)
        for leg in waiting.values():
            if len(waiting) == 1:
                self._attempt(leg, _receive)
            else:
                leg.failure = f"{leg.server.name}: no answer before the deadline"
                leg.is_lost = True

    def _attempt(self, leg: _Leg, step: Callable[[_Leg], None]) -> None:
        has_turn = time.monotonic() < self._deadline
        try:
            step(leg)
        except TierUnavailable as error:
            leg.failure = str(error)
            leg.is_lost = has_turn

    def _settle(self, leg: _Leg) -> list[int]:
        """Enter the answers of a leg; return the names that are to be routed once more."""
        if leg.failure:
            self._miss(leg.positions, leg.failure)
            anew = leg.is_lost and self._topology.lost(leg.server, leg.failure)
            return list(leg.positions) if anew else []
        again: list[int] = []
        lost: list[int] = []
        reason = ""
        for at, answer in zip(leg.positions, leg.answers, strict=True):
            self._outcomes[at] = answer
            if not isinstance(answer, ErrorReply):
                continue
            advice = self._topology.refused(leg.server, answer)
            if isinstance(advice, Ask):
                self._ask(advice.server, at)
                continue
            reason = f"{leg.server.name}: {masked(leg.server.endpoint, answer.text)}"
            self._outcomes[at] = Down(reason)
            if isinstance(advice, Again):
                again.append(at)
            elif answer.code in DOWN_CODES:
                lost.append(at)
            else:
                self._outcomes[at] = Refused(leg.server, answer)
        if lost and self._topology.lost(leg.server, reason):
            again += lost
        return again

    def _ask(self, server: Server, position: int) -> None:
        """Ask for one name that is being moved to ``server``."""
        part = self._request.pick([position])
        try:
            connection = server.acquire(self._until - time.monotonic())
        except TierUnavailable as error:
            self._miss([position], str(error))
            return
        leg = _Leg(server, [position], part, connection)
        self._deadline = min(self._until, time.monotonic() + self._timeout_seconds)
        connection.start(self._deadline - time.monotonic())
        try:
            self._attempt(leg, _ask_once)
        finally:
            _release(leg)
        answer = leg.answers[0] if leg.answers else Down(leg.failure)
        self._outcomes[position] = Refused(server, answer) if isinstance(answer, ErrorReply) else answer

    def _miss(self, positions: Sequence[int], reason: str) -> None:
        for at in positions:
            self._outcomes[at] = Down(reason)


def _send(leg: _Leg) -> None:
    leg.request.send(leg.connection)


def _receive(leg: _Leg) -> None:
    leg.answers = leg.request.receive(leg.connection)


def _ask_once(leg: _Leg) -> None:
    """The slot is being imported: the server serves it to those who say ASKING, for one command."""
    leg.connection.send([command(b"ASKING")])
    leg.request.send(leg.connection)
    leg.connection.reply()
    leg.answers = leg.request.receive(leg.connection)


def _release(leg: _Leg) -> None:
    """Give the connection back; closed when replies are left on it, or when the server wants another log-in."""
    errors = [answer for answer in leg.answers if isinstance(answer, ErrorReply)]
    if len(leg.answers) < len(leg.positions) or any(error.code in REJOIN_CODES for error in errors):
        leg.connection.close()
    leg.server.release(leg.connection)
