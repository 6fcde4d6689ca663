"""The lookups that were answered last. Pure state, guarded by the core's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from kvstrata.cache.lookups import Lookup

MAX_RECENT = 256
"""How many are remembered. One of a prompt of 32,000 tokens takes about 0.1 MB, mostly its hashes."""


class Recent:
    """A bounded ring."""

    def __init__(self, *, isolated: bool = False) -> None:
        """``isolated``: those with a salt are found, and not listed."""
        self._isolated = isolated
        self._lookups: deque[Lookup] = deque(maxlen=MAX_RECENT)

    def add(self, lookup: Lookup) -> None:
        """``lookup`` was answered."""
        self._lookups.append(lookup)

    def __iter__(self) -> Iterator[Lookup]:
        """The latest first."""
        return reversed(self._lookups)

    def listed(self) -> Iterator[Lookup]:
        """Those that anybody may see, the latest first."""
        return (lookup for lookup in self if not (self._isolated and lookup.prefix.salt_id))

    def find(self, request_id: str) -> Lookup | None:
        """The latest of a request. Connectors add to an engine's id (``-0`` a part, ``#1`` an attempt)."""
        return next((lookup for lookup in self if _is_of(lookup.request_id, request_id)), None)


def _is_of(recorded: str, asked: str) -> bool:
    return recorded == asked or (recorded.startswith(asked) and recorded[len(asked)] in "#-")
