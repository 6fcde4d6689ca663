"""Warming, without a server."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstrata.operations.entries import Entries
from kvstrata.operations.jobs import Job
from kvstrata.operations.prompts import Prompts
from kvstrata.operations.warm import Warming
from kvstrata.testing.client import CHUNK_SIZE, payload_of, prompt
from kvstrata.testing.core import open_core, settle, store
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.dict import DictTier


class HeldUpTier(DictTier):
    """Deletes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.deletes = threading.Event()

    def delete(self, keys: Sequence[str]) -> int:
        assert self.deletes.wait(20)
        return super().delete(keys)


def test_what_is_being_cleared_does_not_come_back() -> None:
    tier = HeldUpTier()
    stored = prompt(2 * CHUNK_SIZE, seed=1)
    with open_core([tier]) as cache:
        namespace = cache.intern(stored.namespace)
        store(cache, "o", namespace, 0, stored.pieces, payload_of)
        settle(cache)
        warming = Warming(cache, Entries(cache), Prompts(cache))
        cache.clear()
        assert len(tier.frames) == 2
        for work in ("prompts", "keys"):
            job = Job("warm")
            if work == "prompts":
                warming.warm_prompts(job, [namespace], [stored.tokens], "")
            else:
                warming.warm_keys(job, [namespace], list(tier.frames))
            assert (job.result["loaded"], job.result["not_held"]) == (0, 2)
            assert len(cache.index) == 0
            assert cache.l1_stats()["used_bytes"] == 0
        tier.deletes.set()
        wait_until(lambda: not tier.frames, "it is cleared")
