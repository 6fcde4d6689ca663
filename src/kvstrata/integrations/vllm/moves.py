"""What a worker copied between its device and the cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Moves:
    """Sums since they were last taken."""

    loads: int = 0
    failed_loads: int = 0
    """Requests whose hit could not be loaded, and is recomputed."""
    load_tokens: int = 0
    load_bytes: int = 0
    load_seconds: float = 0.0
    """On a device: until the copies were queued."""
    stores: int = 0
    store_tokens: int = 0
    store_bytes: int = 0
    store_seconds: float = 0.0

    def add(self, num_tokens: int, num_bytes: int, seconds: float, *, is_store: bool) -> None:
        """A copy of one request, or of one step's stores."""
        if is_store:
            self.stores += 1
            self.store_tokens += num_tokens
            self.store_bytes += num_bytes
            self.store_seconds += seconds
        else:
            self.loads += 1
            self.load_tokens += num_tokens
            self.load_bytes += num_bytes
            self.load_seconds += seconds
