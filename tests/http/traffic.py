"""Requests as inference engines make them: conversations that share system prompts, over a real client."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator

from kvstrata.client import RemoteClient
from kvstrata.client.base import Client
from kvstrata.testing.client import Prompt, fill, make_tokens, wait_lookup
from kvstrata.types import Hit, Namespace

PREFILL_TOKENS_PER_SECOND = 3000


class Conversations:
    """Some conversations with a model; each turn asks for all before it and adds to it."""

    def __init__(
        self, client: Client, namespace: Namespace, *, turn_tokens: int = 150, seed: int = 1
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._turn_tokens = turn_tokens
        self._random = random.Random(seed)
        self._systems = [make_tokens(4 * turn_tokens, seed + each) for each in range(3)]
        self._open: list[list[int]] = []

    def turn(self, request_id: str | None = None) -> None:
        """One request, as a connector makes it: look up, copy what is held, compute and store the rest."""
        if len(self._open) < 8 or self._random.random() < 0.2:
            self._open = [*self._open[-7:], list(self._random.choice(self._systems))]
        tokens = self._random.choice(self._open)
        added = self._random.randrange(self._turn_tokens, 3 * self._turn_tokens)
        tokens += [self._random.randrange(50_000) for _ in range(added)]
        asked = Prompt(tokens, self._namespace)
        request_id = request_id or f"chatcmpl-{self._random.getrandbits(64):016x}"
        hit = wait_lookup(self._client, request_id, asked)
        if hit.num_tokens:
            self._load(request_id, hit)
        num_computed = len(asked) - hit.num_tokens
        if num_computed:
            self._client.report_prefill(
                self._namespace, num_computed, num_computed / PREFILL_TOKENS_PER_SECOND
            )
            self._store(asked)
        self._client.release(request_id)

    def _load(self, request_id: str, hit: Hit) -> None:
        started = time.perf_counter()
        payloads = self._client.payloads(request_id, 0, hit, self._namespace)
        assert payloads is not None
        num_bytes = sum(len(bytes(payload)) for payload in payloads)
        self._client.report_move(num_bytes, time.perf_counter() - started, is_store=False)

    def _store(self, asked: Prompt) -> None:
        started = time.perf_counter()
        reservation = self._client.reserve(self._namespace, 0, asked.pieces)
        fill(reservation)
        num_bytes = sum(len(buffer) for buffer in reservation.buffers if buffer is not None)
        self._client.commit(reservation)
        self._client.report_move(num_bytes, time.perf_counter() - started, is_store=True)


@contextlib.contextmanager
def running(endpoint: str, namespace: Namespace, *, pause_seconds: float = 0.1) -> Iterator[None]:
    """Turns of conversations one after the other, on a thread and a client of their own."""
    ended = threading.Event()

    def work() -> None:
        with RemoteClient(endpoint, "traffic", timeout_seconds=10) as client:
            assert client.wait_connected(20)
            conversations = Conversations(client, namespace)
            while not ended.wait(pause_seconds):
                conversations.turn()

    thread = threading.Thread(target=work, name="kvstrata-test-traffic")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
