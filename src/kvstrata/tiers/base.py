"""The tier contract.

A tier stores opaque frames under readable keys (``types.Namespace.key``). It is blocking and batch-first,
works in memory that the caller owns, and answers for each key on its own. Threads, deadlines, retries,
circuit breaking, codecs, checksums and write policies live once, in ``cache.io``; a tier has none of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar

import msgspec

from kvstrata.quotas import Quota, Usage
from kvstrata.types import Miss, TierStats

PROBE_KEY = "kvstrata@probe@0@0@0"
"""A key that nobody has: whoever wants to know whether a tier answers asks for it."""


class TierOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings that every tier has; each tier adds its own in a subclass."""

    name: str = ""
    """How logs and metrics call this tier; its kind by default."""
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 5.0
    """Deadline of one operation on one connection; a tier turns it into socket timeouts."""
    num_workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """Batches that are worked on at once; also the number of connections of a network tier."""


class Tier(ABC):
    """One level of storage below L1.

    Threading: every method may be called from several threads at once, at most ``num_workers``.
    Blocking: a call returns within the tier's own timeouts; the caller never interrupts it.
    Errors: a key that is not held is a value (``Miss``, ``False``). A fault of the backend is raised as
    :class:`~kvstrata.errors.TierUnavailable` or :class:`~kvstrata.errors.TierFull`; nothing else may come out.
    Durability: after ``write`` returned, ``read`` from any thread finds the frame or, when it has been
    evicted or lost, a miss; never a part of it, never another key's.
    """

    kind: ClassVar[str]
    """The name of the implementation ("disk", "redis")."""
    Options: ClassVar[type[TierOptions]] = TierOptions
    """The settings this tier understands."""

    @abstractmethod
    def contains(self, keys: Sequence[str]) -> list[bool]:
        """Which of ``keys`` are held now. One round trip however many keys there are."""

    @abstractmethod
    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """Read each key's frame to the start of its buffer.

        Returns for each key the number of bytes of the frame, or a miss. A frame that is larger than its
        buffer is a miss with reason ``corrupt``. After a miss the buffer's content is undefined.
        """

    @abstractmethod
    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """Store each frame under its key, replacing what was there. Makes room by evicting where it can.

        The frames' memory is the caller's; it may change after the call returned.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> int:
        """Drop ``keys``; return how many were held. Missing keys are no error."""

    @abstractmethod
    def scan(self, prefix: str = "") -> Iterator[str]:
        """Iterate over the keys that begin with ``prefix``, in any order, without blocking the backend.

        Keys written or deleted meanwhile may or may not be seen. Entries of others are left out.
        """

    @abstractmethod
    def stats(self) -> TierStats:
        """What the tier holds, cheaply; unknown numbers are None."""

    def describe(self) -> str:
        """Where the data is, for logs and messages, without secrets."""
        return self.kind

    def close(self) -> None:  # noqa: B027  most tiers have something to release, not all
        """Release connections and files. No other call follows. Idempotent."""


class QuotaTier(Tier):
    """A tier that shares its budget out among salts, whose ids it finds in the headers of frames."""

    @abstractmethod
    def set_quotas(self, quotas: Mapping[bytes, Quota], default: Quota | None) -> None:
        """Have these quotas from now on, by the ids of their salts, and ``default`` for each other salt. Evicts
        what they do not allow. May take as long as a look at every entry.
        """

    @abstractmethod
    def usage(self, salt_id: bytes | None) -> Usage:
        """What a salt with a quota holds; None: all that the default is for, together. Without I/O."""


class ExpiringTier(Tier):
    """A tier whose entries expire, after a time that may be changed while it is in use."""

    @property
    @abstractmethod
    def ttl_seconds(self) -> int | None:
        """How long entries that are written now live; None: for ever."""

    @abstractmethod
    def set_ttl(self, seconds: int | None) -> None:
        """Change it. What is stored already keeps its time. ``seconds`` is at least 1."""
