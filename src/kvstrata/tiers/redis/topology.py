"""Which server serves which name. All else is the same for one server, several, Sentinel and Cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from kvstrata.tiers.redis.resp import ErrorReply
from kvstrata.tiers.redis.server import Limits, Server


class Route(msgspec.Struct, frozen=True):
    """Where some of the names of a request go."""

    server: Server | None
    """None: nobody can be asked for them now."""
    positions: Sequence[int]
    """Which names, as positions in the request."""
    reason: str = ""
    """Why there is nobody."""


class Again(msgspec.Struct, frozen=True):
    """Route the name once more: the topology has changed."""


class Ask(msgspec.Struct, frozen=True):
    """Ask ``server`` for this name, this time only."""

    server: Server


class Topology(ABC):
    """The servers of a tier and their shares. Thread-safe; has no threads that outlive what they do."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    @abstractmethod
    def route(self, names: Sequence[bytes], *, is_write: bool) -> list[Route]:
        """Where each name goes, every position once, in an order of servers that is the same for all callers
        (they hold connections to several at once).

        Raises:
            TierUnavailable: there is no server at all.
        """

    @abstractmethod
    def servers(self) -> list[Server]:
        """Those that hold entries, each entry on one of them.

        Raises:
            TierUnavailable: they are not known.
        """

    def lost(self, server: Server, reason: str) -> bool:  # noqa: ARG002  the single server has no choice
        """A server did not answer, or says that it does not serve. Whether to route its names anew at once."""
        return False

    def refused(self, server: Server, reply: ErrorReply) -> Again | Ask | None:  # noqa: ARG002
        """A server refused one command. None: that is the answer."""
        return None

    @property
    def is_partly_up(self) -> bool:
        """Whether servers are left to be asked when one is lost."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Close all connections. Idempotent."""


class SingleTopology(Topology):
    """One server. It is always asked: whoever uses the tier has a breaker."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.limits)
        self._server = server

    def route(self, names: Sequence[bytes], *, is_write: bool) -> list[Route]:  # noqa: ARG002
        return [Route(self._server, range(len(names)))]

    def servers(self) -> list[Server]:
        return [self._server]

    def close(self) -> None:
        self._server.close()
