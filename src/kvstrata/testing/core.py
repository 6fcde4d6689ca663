"""A core in this process, over given tiers and plain memory, driven without a client."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvstrata.cache.breaker import Breaker
from kvstrata.cache.cache import Cache
from kvstrata.cache.gate import Gate
from kvstrata.cache.index import Index, State
from kvstrata.cache.io import TierIO
from kvstrata.codecs.base import Codec
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import Decoders
from kvstrata.config import WritePolicy
from kvstrata.frame import room_bytes
from kvstrata.memory.pool import SlotAllocator
from kvstrata.metrics import Metrics
from kvstrata.policies.base import EvictionPolicy
from kvstrata.policies.lru import LRUPolicy
from kvstrata.testing.waiting import PATIENCE_SECONDS
from kvstrata.tiers.base import Tier
from kvstrata.tracing import Tracer
from kvstrata.types import Hit, Namespace, Piece, Prefix


@contextmanager
def open_core(
    tiers: Sequence[Tier] = (),
    *,
    pool_bytes: int = 1 << 20,
    codecs: Sequence[Codec] = (),
    decoders: Decoders | None = None,
    index: Callable[[SlotAllocator, EvictionPolicy], Index] = Index,
    policy: EvictionPolicy | None = None,
    gate: str = "always",
    write_policies: Sequence[WritePolicy] = (),
    read_fastest: bool = False,
    isolated: bool = False,
    keep_in_l1: bool = True,
    lookup_timeout_seconds: float = 10.0,
    probe_seconds: float = 0.05,
    num_workers: int = 4,
    clock: Callable[[], float] = time.monotonic,
    tracer: Tracer | None = None,
) -> Iterator[Cache]:
    """A core whose tiers are named ``tier0``, ``tier1`` ...; the first of ``codecs`` is what they write with."""
    metrics = Metrics()
    decoders = decoders or Decoders(known=codecs)
    opened = [
        TierIO(
            tier,
            f"tier{number}",
            codecs[0] if codecs else NaiveCodec(),
            decoders,
            metrics,
            num_workers=num_workers,
            write_queue_bytes=pool_bytes,
            write_policy=write_policies[number] if number < len(write_policies) else "all",
            breaker=Breaker(),
            probe_seconds=probe_seconds,
        )
        for number, tier in enumerate(tiers)
    ]
    cache = Cache(
        memoryview(bytearray(pool_bytes)),
        uuid.uuid4().hex,
        index(SlotAllocator(pool_bytes), policy or LRUPolicy()),
        opened,
        metrics,
        gate=Gate(gate),
        keep_in_l1=keep_in_l1,
        read_fastest=read_fastest,
        isolated=isolated,
        lookup_timeout_seconds=lookup_timeout_seconds,
        clock=clock,
        tracer=tracer,
    )
    try:
        yield cache
    finally:
        cache.close()


def store(
    cache: Cache,
    owner: str,
    namespace: Namespace,
    shard: int,
    pieces: Sequence[Piece],
    content: Callable[[Piece, int, int], bytes],
) -> list[Piece]:
    """Reserve, fill with ``content(piece, shard, size)``, commit; the pieces that got a slot."""
    slots = cache.reserve(owner, namespace, shard, pieces)
    taken = []
    for piece, slot in zip(pieces, slots, strict=True):
        if slot is not None:
            view = cache.pool[slot.offset : slot.offset + slot.payload_bytes]
            view[:] = content(piece, shard, slot.payload_bytes)
            taken.append(piece)
    cache.commit(owner, shard, [piece.chunk_hash for piece in taken])
    return taken


def wait_lookup(cache: Cache, owner: str, request_id: str, namespace: Namespace, prefix: Prefix) -> Hit:
    """Look up until the answer is final."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (hit := cache.lookup(owner, request_id, namespace, prefix)).pending:
        assert time.monotonic() < deadline, "the look-up is pending for ever"
        time.sleep(0.0005)
    return hit


def payloads(cache: Cache, hit: Hit, shard: int, namespace: Namespace) -> list[bytes]:
    """Copies of what a hit delivers."""
    sizes = [namespace.layout.payload_bytes(piece.num_tokens) for piece in hit.pieces]
    return [bytes(cache.pool[o : o + size]) for o, size in zip(hit.offsets[shard], sizes, strict=True)]


def settle(cache: Cache) -> None:
    """Wait until every read and write that was queued has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not cache.flush(PATIENCE_SECONDS) or _is_loading(cache):
        assert time.monotonic() < deadline, "the tiers do not come to rest"
        time.sleep(0.0005)


def _is_loading(cache: Cache) -> bool:
    return any(entry.state is State.LOADING for entry in list(cache.index.entries.values()))


def frame_bytes(namespace: Namespace, num_tokens: int) -> int:
    """Bytes of the slot of a piece."""
    return room_bytes(namespace.layout.payload_bytes(num_tokens))
