"""What metrics and explanations add to a look-up, for ``lookup``.

A core as it is takes turns with one that counts and keeps nothing of its answers, both in this process.
"""

from __future__ import annotations

import time

import msgspec

from kvstrata.bench.report import median
from kvstrata.cache.cache import Cache
from kvstrata.cache.gate import Gate
from kvstrata.cache.index import Index
from kvstrata.cache.lookups import Lookup
from kvstrata.hashing import PrefixHasher, full_chunks
from kvstrata.memory.pool import SLOT_ALIGNMENT_BYTES, SlotAllocator
from kvstrata.metrics import Metrics
from kvstrata.policies.lru import LRUPolicy
from kvstrata.types import Hit, Namespace, Prefix

_WARM_UP = 300
"""More than the look-ups that are remembered: from then on each makes the core forget one."""


class Added(msgspec.Struct, frozen=True):
    """Milliseconds, medians of the differences between neighbours."""

    hit: float
    miss: float


class _Unobserved(Cache):
    """Answers, and nothing else."""

    def _answered(self, lookup: Lookup, hit: Hit) -> None:
        pass


def measure(namespace: Namespace, tokens: list[int], lookups: int) -> Added:
    """Look up ``tokens``, of which all is held, and what begins with the second of them, of which nothing is."""
    held, absent = (_hasher(namespace, asked) for asked in (tokens, tokens[1:]))
    num_chunks = len(tokens) // namespace.chunk_size
    pool_bytes = (num_chunks + 1) * SLOT_ALIGNMENT_BYTES
    cores = []
    for kind in (Cache, _Unobserved):
        index = Index(SlotAllocator(pool_bytes), LRUPolicy())
        core = kind(memoryview(bytearray(pool_bytes)), "bench", index, [], Metrics(), gate=Gate())
        pieces = full_chunks(held, namespace.chunk_size, 0, num_chunks)
        core.reserve("bench", core.intern(namespace), 0, pieces)
        core.commit("bench", 0, [piece.chunk_hash for piece in pieces])
        core.report_prefill(core.intern(namespace), 1000, 1.0)
        cores.append(core)
    return Added(
        hit=_difference_ms(cores, namespace, held.prefix(tokens), lookups),
        miss=_difference_ms(cores, namespace, absent.prefix(tokens[1:]), lookups),
    )


def _hasher(namespace: Namespace, tokens: list[int]) -> PrefixHasher:
    hasher = PrefixHasher(namespace)
    hasher.extend(tokens)
    return hasher


def _difference_ms(cores: list[Cache], namespace: Namespace, prefix: Prefix, lookups: int) -> float:
    differences = []
    for number in range(_WARM_UP + lookups):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            core = cores[which]
            interned = core.intern(namespace)
            start = time.perf_counter()
            core.lookup("bench", f"r{number}", interned, prefix)
            seconds[which] = time.perf_counter() - start
            core.release("bench", f"r{number}")
        differences.append((seconds[0] - seconds[1]) * 1000)
    return median(differences[_WARM_UP:])
