"""The eviction policy contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator


class EvictionPolicy(ABC):
    """Orders the entries of one tier for eviction.

    A policy knows keys and sizes only. What must not go now (leased, pinned, being moved, still the prefix of
    another entry) is the caller's knowledge: it passes over such victims. The caller holds one lock around all
    calls, so a policy needs none; nothing here may block.
    """

    @abstractmethod
    def added(self, key: bytes, size: int) -> None:
        """``key`` is now held. It was not before."""

    @abstractmethod
    def touched(self, key: bytes) -> None:
        """``key`` was used. It is held."""

    @abstractmethod
    def removed(self, key: bytes, *, evicted: bool) -> None:
        """``key`` is no longer held: it was evicted as a victim, or deleted for another reason."""

    @abstractmethod
    def victims(self) -> Iterator[bytes]:
        """Held keys, the one to evict first in front.

        The caller takes as many as it needs, and calls ``removed`` for those that it evicts while the
        iterator is suspended, and ``touched`` for those that it passes over because they are in use.
        The iterator tolerates both, never yields a key that is no longer held, and ends.
        """
