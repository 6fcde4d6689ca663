"""The clears of tiers, under way and past. Pure state, guarded by the core's lock."""

from __future__ import annotations

from kvstrata.types import Namespace


class Clears:
    """A clear is of one namespace, or of everything (None). Until a tier is cleared it answers no look-up, and
    nothing is written to it that was stored before."""

    def __init__(self, num_tiers: int) -> None:
        self.count = 0
        """How many have begun."""
        self._last: dict[Namespace | None, int] = {}
        self._running: list[list[Namespace | None]] = [[] for _ in range(num_tiers)]

    def begin(self, namespace: Namespace | None) -> None:
        """A clear begins, in all tiers."""
        self.count += 1
        self._last[namespace] = self.count
        for running in self._running:
            running.append(namespace)

    def ended(self, tier: int, namespace: Namespace | None) -> None:
        self._running[tier].remove(namespace)

    def is_running(self, tier: int, namespace: Namespace) -> bool:
        return any(scope is None or scope is namespace for scope in self._running[tier])

    def is_covered(self, tier: int, namespace: Namespace | None) -> bool:
        """Whether, besides one of this, another clear of at least as much is under way in a tier."""
        return sum(scope is None or scope is namespace for scope in self._running[tier]) > 1

    def since(self, namespace: Namespace, count: int) -> bool:
        """Whether anything cleared ``namespace`` after so many clears had begun. May be asked without the lock."""
        return max(self._last.get(namespace, 0), self._last.get(None, 0)) > count
