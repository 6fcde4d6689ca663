"""Frames are encoded side by side ahead of their turn, and written one after the other."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvstrata.codecs.base import PayloadDescription
from kvstrata.testing.client import CHUNK_SIZE, payload_of, prompt
from kvstrata.testing.codec import ZipCodec
from kvstrata.testing.core import open_core, settle, store
from kvstrata.testing.waiting import PATIENCE_SECONDS, wait_until
from kvstrata.tiers.dict import DictTier

POOL_BYTES = 4 << 20
NUM_CHUNKS = 12
ASKED = prompt(NUM_CHUNKS * CHUNK_SIZE, seed=1)


class Observed(ZipCodec):
    """Counts what it encodes, and waits in it for whatever the test wants."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.meeting: threading.Barrier | None = None
        self._lock = threading.Lock()

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        with self._lock:
            self.num_begun += 1
        if self.meeting is not None:
            self.meeting.wait(PATIENCE_SECONDS)
        return super().encode(payload, what, into)


class Gated(DictTier):
    """Writes wait until they may; remembers their order."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = threading.Event()
        self.order: list[str] = []

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        assert self.may_write.wait(PATIENCE_SECONDS)
        self.order += keys
        super().write(keys, frames)


def test_frames_are_encoded_side_by_side_and_written_in_order() -> None:
    codec, tier = Observed(), Gated()
    codec.meeting = threading.Barrier(2)  # nobody gets through it alone
    tier.may_write.set()
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=[codec], num_workers=4) as cache:
        namespace = cache.intern(ASKED.namespace)
        store(cache, "o", namespace, 0, ASKED.pieces, payload_of)
        settle(cache)
        assert tier.order == [namespace.key(piece.chunk_hash, 0) for piece in ASKED.pieces]
        assert cache.tiers[0].num_dropped == 0


def test_few_frames_are_held_while_the_tier_is_slow() -> None:
    codec, tier = Observed(), Gated()
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=[codec], num_workers=5) as cache:
        store(cache, "o", cache.intern(ASKED.namespace), 0, ASKED.pieces, payload_of)
        wait_until(lambda: codec.num_begun == 3, "as many as there are threads are encoded")
        assert cache.tiers[0].queued_bytes > 0
        tier.may_write.set()
        settle(cache)
        assert codec.num_begun == len(tier.order) == NUM_CHUNKS, "each was encoded once"


def test_what_is_called_off_is_not_encoded() -> None:
    codec, tier = Observed(), Gated()
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=[codec], num_workers=3) as cache:
        store(cache, "o", cache.intern(ASKED.namespace), 0, ASKED.pieces, payload_of)
        wait_until(lambda: codec.num_begun == 1, "the first is encoded")
        cache.clear()
        tier.may_write.set()
        settle(cache)
        assert (codec.num_begun, len(tier.order)) == (1, 1), "that one was being written"
        store(cache, "o", cache.intern(ASKED.namespace), 0, ASKED.pieces, payload_of)
        settle(cache)
        assert len(tier.order) == 1 + NUM_CHUNKS


def test_a_codec_that_breaks_its_contract_costs_its_own_write_only() -> None:
    class Broken(Observed):
        def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
            super().encode(payload, what, into)
            if what.first_token == CHUNK_SIZE:
                raise RuntimeError("it is broken")
            return len(payload)

    codec, tier = Broken(), Gated()
    tier.may_write.set()
    with open_core([tier], pool_bytes=POOL_BYTES, codecs=[codec]) as cache:
        store(cache, "o", cache.intern(ASKED.namespace), 0, ASKED.pieces, payload_of)
        settle(cache)
        assert (len(tier.order), cache.tiers[0].num_dropped) == (NUM_CHUNKS - 1, 1)
