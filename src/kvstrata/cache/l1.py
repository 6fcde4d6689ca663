"""L1 as the parts of one core share it: the pool, its index, and the lock around all state of the core."""

from __future__ import annotations

import threading
import time

from kvstrata.cache.frames import Transfer, transfer_of
from kvstrata.cache.index import Entry, Index, State


class L1:
    """The host memory tier. The caller of every method holds ``lock``."""

    def __init__(self, pool: memoryview, index: Index, *, keep: bool) -> None:
        self.pool = pool
        self.index = index
        self.keep = keep
        """False: L1 only passes data on to and from the tiers."""
        self.lock = threading.Lock()

    def transfer(self, entry: Entry, tokens_hash: bytes = b"") -> Transfer:
        """What moves ``entry`` to or from a tier."""
        return transfer_of(self.pool, entry, tokens_hash, int(time.time()))

    def unlease(self, entry: Entry) -> None:
        """One lease less; what only passes through goes with the last one."""
        self.index.unlease(entry)
        if not self.keep and entry.leases == 0 and entry.state is State.READY:
            self.index.drop(entry)
