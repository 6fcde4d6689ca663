"""The clears of tiers, under way and past. Pure state, guarded by the core's lock."""

from __future__ import annotations

from collections.abc import Iterable

from kvstrata.types import Namespace


class Clears:
    """A clear is of one namespace, or of everything (None). Until a tier is cleared it answers no look-up, and
    nothing is written to it that was stored before."""

    def __init__(self, num_tiers: int) -> None:
        self.count = 0
        """How many have begun."""
        self._last: dict[Namespace | None, int] = {}
        self._running: list[list[Namespace | None]] = [[] for _ in range(num_tiers)]

    def begin(self, namespace: Namespace | None, tiers: Iterable[int]) -> None:
        """A clear begins, in ``tiers``; in the others one that has not begun its work covers it."""
        self.count += 1
        self._last[namespace] = self.count
        for tier in tiers:
            self._running[tier].append(namespace)

    def ended(self, tier: int, namespace: Namespace | None) -> None:
        self._running[tier].remove(namespace)

    def is_running(self, tier: int, namespace: Namespace) -> bool:
        return any(scope is None or scope is namespace for scope in self._running[tier])

    def covers(self, tier: int, namespace: Namespace | None) -> bool:
        """Whether a clear of at least this is under way in a tier."""
        return None in self._running[tier] or namespace in self._running[tier]

    def since(self, namespace: Namespace, count: int) -> bool:
        """Whether anything cleared ``namespace`` after so many clears had begun. May be asked without the lock."""
        return max(self._last.get(namespace, 0), self._last.get(None, 0)) > count
