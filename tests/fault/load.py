"""A client of the core under load: every answer is timed and every byte of it compared."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from kvstrata.client import LocalClient
from kvstrata.testing.client import CHUNK_SIZE, Prompt, fill, payload_of, prompt
from kvstrata.testing.waiting import repeating, wait_until
from kvstrata.types import Hit, Piece

T = TypeVar("T")
NUM_THREADS = 3
NUM_PROMPTS = 24
_STEP_SECONDS = 0.002
"""Between two questions for a pending answer, as the steps of a scheduler."""


@functools.cache
def known_payload(piece: Piece, size: int) -> bytes:
    return payload_of(piece, 0, size)


@functools.cache
def prompts() -> list[Prompt]:
    """Prompts of one to five chunks with tails; some share nothing, all are known to every thread."""
    return [prompt(CHUNK_SIZE * (1 + seed % 5) + 7 * (seed % 3), seed=seed) for seed in range(NUM_PROMPTS)]


class Load:
    """What the threads have seen. ``step`` is one request: look up, compare, store what was missed."""

    def __init__(self, client: LocalClient) -> None:
        self.client = client
        self.wrong_bytes = 0
        self.longest_wait_seconds = 0.0
        self.num_requests = 0
        self.num_tier_hits = 0
        self._lock = threading.Lock()

    def step(self, request_id: str, asked: Prompt) -> Hit:
        """One request; nothing of it may wait for a backend beyond the look-up's deadline."""
        hit = self._timed(lambda: self._look_up(request_id, asked))
        if hit.num_tokens < len(asked):
            reservation = self._timed(lambda: self.client.reserve(asked.namespace, 0, asked.pieces))
            fill(reservation)
            self._timed(lambda: self.client.commit(reservation))
        with self._lock:
            self.num_requests += 1
            self.num_tier_hits += bool(set(hit.tokens_by_tier) - {"l1"})
        return hit

    def _look_up(self, request_id: str, asked: Prompt) -> Hit:
        while (hit := self.client.lookup(request_id, asked.namespace, asked.prefix)).pending:
            time.sleep(_STEP_SECONDS)
        payloads = self.client.payloads(request_id, 0, hit, asked.namespace)
        for piece, payload in zip(hit.pieces, payloads or [], strict=payloads is not None):
            wanted = known_payload(piece, len(payload))
            if payload != wanted:
                differing = sum(a != b for a, b in zip(payload, wanted, strict=True))
                with self._lock:
                    self.wrong_bytes += differing
        self.client.release(request_id)
        return hit

    def _timed(self, call: Callable[[], T]) -> T:
        started = time.monotonic()
        result = call()
        seconds = time.monotonic() - started
        with self._lock:
            self.longest_wait_seconds = max(self.longest_wait_seconds, seconds)
        return result

    @contextmanager
    def running(self) -> Iterator[None]:
        """Threads that work until the block ends; what went wrong in them is raised then."""
        with repeating(*map(self._steps, range(NUM_THREADS))):
            yield

    def _steps(self, number: int) -> Callable[[], None]:
        """What one thread does again and again."""
        rng, counter = random.Random(number), itertools.count(1)
        return lambda: self.step(f"{number}.{next(counter)}", rng.choice(prompts()))

    def goes_on(self, num_requests: int = 20) -> None:
        """Requests are answered now, and again."""
        before = self.num_requests
        wait_until(lambda: self.num_requests > before + num_requests, "requests go on")

    def seconds_until_used(self, name: str, seed: int, bound_seconds: float) -> float | None:
        """From now until something new was written to the tier ``name`` and read from it; None: never."""
        started = time.monotonic()
        count = 0
        while time.monotonic() < started + bound_seconds:
            count += 1
            asked = prompt(3 * CHUNK_SIZE, seed=seed)
            hit = self.step(f"recovery {seed}.{count}", asked)
            if hit.tokens_by_tier == {name: len(asked)}:
                return time.monotonic() - started
            time.sleep(0.005)
        return None
