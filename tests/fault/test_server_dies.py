"""The server is killed, stopped and started again under the feet of its clients."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from kvstrata.client import Client, RemoteClient
from kvstrata.testing.client import (
    CHUNK_SIZE,
    Prompt,
    check_payloads,
    fill,
    look,
    payload_of,
    prompt,
    small_settings,
    store,
    wait_lookup,
)
from kvstrata.testing.forked import ForkedServer, ServerHost
from kvstrata.testing.process import free_port
from kvstrata.testing.waiting import repeating, wait_until

T = TypeVar("T")
TIMEOUT_SECONDS = 1.0
MARGIN_SECONDS = 10.0
"""Far above what a verb may take beyond its timeout; a hang is what would exceed it."""


class Watched:
    """A client that is used as an engine would, each call with a watch on it."""

    def __init__(self, client: Client, seed: int, prompts: list[Prompt]) -> None:
        self.client = client
        self.slowest_seconds = 0.0
        self.num_hits = 0
        self.num_calls = 0
        self._random = random.Random(seed)
        self._prompts = prompts

    def step(self) -> None:
        """One request: look up, check what was found, store what was not."""
        asked = self._random.choice(self._prompts)
        request_id = str(self.num_calls)
        hit = self.timed(lambda: self.client.lookup(request_id, asked.namespace, asked.prefix))
        if hit.num_tokens:
            payloads = self.timed(lambda: self.client.payloads(request_id, 0, hit, asked.namespace))
            if payloads is not None:
                self.num_hits += 1
                for piece, payload in zip(hit.pieces, payloads, strict=True):
                    assert bytes(payload) == payload_of(piece, 0, len(payload))
        self.timed(lambda: self.client.release(request_id))
        if hit.num_tokens < len(asked):
            reservation = self.timed(lambda: self.client.reserve(asked.namespace, 0, asked.pieces))
            fill(reservation)
            end = self.client.abort if self._random.random() < 0.1 else self.client.commit
            self.timed(lambda: end(reservation))

    def timed(self, call: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            return call()
        finally:
            self.num_calls += 1
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)


def working(watched: list[Watched]) -> AbstractContextManager[list[BaseException]]:
    """Each client works in a thread of its own until the block ends."""
    return repeating(*(one.step for one in watched), pause_seconds=0.0005)


def connect(endpoint: str, *, map_pool: bool = True) -> RemoteClient:
    client = RemoteClient(endpoint, "test", timeout_seconds=TIMEOUT_SECONDS, map_pool=map_pool)
    assert client.wait_connected(20)
    return client


def num_mapped_pools() -> int:
    return Path("/proc/self/maps").read_text().count("kvstrata-l1")


def kill_again_and_again(host: ServerHost, rounds: int) -> None:
    rng = random.Random(rounds)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    prompts = [prompt(4 * CHUNK_SIZE + 7 * seed, seed=seed) for seed in range(10)]
    before = num_mapped_pools()
    server = host.start(small_settings(), endpoint=endpoint)
    with connect(endpoint) as first, connect(endpoint, map_pool=False) as second, connect(endpoint) as third:
        watched = [Watched(client, seed, prompts) for seed, client in enumerate((first, second))]
        with working(watched) as failures:
            for _ in range(rounds):
                time.sleep(rng.uniform(0.0, 0.15))
                server.end(signal.SIGKILL)
                time.sleep(rng.choice([0.0, 0.0, 0.1]))
                server = host.start(small_settings(), endpoint=endpoint)
                if failures:
                    break
            hits = [one.num_hits for one in watched]
            wait_until(
                lambda: (
                    bool(failures) or all(one.num_hits > n + 5 for one, n in zip(watched, hits, strict=True))
                ),
                "both use the last server",
            )
        assert third.wait_connected(20), "also one that said nothing all the time"
        assert store(third, prompt(100, seed=99)) == 100
        assert look(third, "r", prompt(100, seed=99)) == 100
        # Each client keeps the present pool and the one before, no more.
        assert num_mapped_pools() - before <= 4
        assert max(one.slowest_seconds for one in watched) < TIMEOUT_SECONDS + MARGIN_SECONDS
        stats = third.stats()
        assert stats["sessions"] == 3
        wait_until(lambda: third.stats()["l1"]["reservations"] == 0, "no reservation is left")
        wait_until(lambda: third.stats()["l1"]["lookups"] == 0, "no lease is left")
    assert num_mapped_pools() == before
    server.end()


def test_killed_at_random_instants(server_host: ServerHost) -> None:
    kill_again_and_again(server_host, rounds=20)


@pytest.mark.slow
def test_killed_at_random_instants_many_times(server_host: ServerHost) -> None:
    kill_again_and_again(server_host, rounds=300)


def test_ended_by_sigterm_while_in_use(server_host: ServerHost) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    prompts = [prompt(4 * CHUNK_SIZE, seed=seed) for seed in range(10)]
    server = server_host.start(small_settings(), endpoint=endpoint)
    with connect(endpoint) as client:
        watched = Watched(client, 0, prompts)
        with working([watched]):
            for _ in range(3):
                time.sleep(0.1)
                server.end(signal.SIGTERM)
                assert "Traceback" not in server.log_path.read_text()
                server = server_host.start(small_settings(), endpoint=endpoint)
                before = watched.num_hits
                wait_until(lambda before=before: watched.num_hits > before + 3, "it is used again")
    server.end()


def test_absent_at_first(server_host: ServerHost) -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    asked = prompt(200, seed=1)
    with RemoteClient(endpoint, "early", timeout_seconds=TIMEOUT_SECONDS) as client:
        started = time.monotonic()
        for number in range(100):
            assert not client.connected
            assert client.lookup(str(number), asked.namespace, asked.prefix).num_tokens == 0
            assert client.reserve(asked.namespace, 0, asked.pieces).num_tokens == 0
            client.release(str(number))
        assert client.stats() == {}
        assert time.monotonic() - started < 100 * TIMEOUT_SECONDS, "calls do not wait for nobody"
        with server_host.start(small_settings(), endpoint=endpoint):
            wait_until(lambda: client.connected, "it is found")
            assert store(client, asked) == 200
            assert look(client, "r", asked) == 200


def test_the_first_request_after_a_restart_is_answered(server_host: ServerHost, tmp_path: Path) -> None:
    """From the disk, in this case; and so is the first of a client that finds its server only now."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    settings = small_settings(tiers=({"kind": "disk", "path": str(tmp_path), "max_bytes": 1 << 30},))
    asked = prompt(200, seed=1)
    with (
        RemoteClient(endpoint, "test", timeout_seconds=10) as client,
        RemoteClient(endpoint, "idle", timeout_seconds=10) as idle,
    ):
        with server_host.start(settings, endpoint=endpoint) as server:
            assert client.wait_connected(20)
            store(client, asked)
            assert wait_lookup(client, "stored", asked).num_tokens == 200  # the commit has arrived
            client.release("stored")
            server.end(signal.SIGTERM)
        wait_until(lambda: client._channel.connections % 2 == 0, "the connection is lost")
        with server_host.start(settings, endpoint=endpoint):
            for each in (client, idle):
                wait_until(lambda each=each: each._channel.connections % 2 == 1, "the server is there")
                hit = wait_lookup(each, "r", asked)
                assert hit.num_tokens == 200
                each.release("r")


# A server that does not answer


@pytest.fixture
def server(server_host: ServerHost) -> Iterator[ForkedServer]:
    with server_host.start(small_settings()) as server:
        yield server


@contextmanager
def stopped(server: ForkedServer) -> Iterator[None]:
    server.send(signal.SIGSTOP)
    try:
        yield
    finally:
        server.send(signal.SIGCONT)


@pytest.mark.parametrize("map_pool", [True, False])
def test_a_server_that_hangs_costs_one_timeout(server: ForkedServer, map_pool: bool) -> None:
    held, other = prompt(200, seed=1), prompt(200, seed=2)
    with connect(server.endpoint, map_pool=map_pool) as client:
        store(client, held)
        hit = client.lookup("held", held.namespace, held.prefix)
        assert hit.num_tokens == 200
        with stopped(server):
            watched = Watched(client, 0, [held, other])
            watched.step()
            assert watched.slowest_seconds < TIMEOUT_SECONDS + MARGIN_SECONDS
            started = time.monotonic()
            num_steps = 60
            for _ in range(num_steps):
                watched.step()
            assert watched.num_hits == 0
            assert time.monotonic() - started < num_steps * TIMEOUT_SECONDS / 2, "each call pays again"
            if map_pool:  # what was promised before is still there
                check_payloads(client, "held", hit, held.namespace)
        wait_until(lambda: client.connected, "it is used again")
        assert look(client, "again", held) == 200
        assert store(client, other) == 200


def test_what_could_not_be_said_is_said_later(server: ForkedServer) -> None:
    """Leases and slots that a client gave back, or never knew it got, while nobody answered."""
    held, first, second = (prompt(200, seed=seed) for seed in (1, 2, 3))
    with connect(server.endpoint) as client, connect(server.endpoint) as other:
        store(client, held)
        client.lookup("held", held.namespace, held.prefix)
        reserved = [client.reserve(one.namespace, 0, one.pieces) for one in (first, second)]
        with stopped(server):
            assert client.lookup("lost", held.namespace, held.prefix).num_tokens == 0
            assert not client.connected
            client.release("held")
            client.commit(reserved[0])
            client.abort(reserved[1])
        wait_until(lambda: client.connected, "it is used again")
        wait_until(lambda: other.stats().get("l1", {}).get("lookups") == 0, "no lease is left")
        wait_until(lambda: other.stats()["l1"]["reservations"] == 0, "no slot is left")
        assert store(client, first) == 200
        assert look(other, "r", first) == 200


def test_a_reservation_whose_answer_was_lost_is_given_back(server: ForkedServer) -> None:
    kept, lost = prompt(325, seed=1), prompt(200, seed=2)
    with connect(server.endpoint) as client, connect(server.endpoint) as other:
        store(client, prompt(1, seed=3))  # the namespace is known
        mine = client.reserve(kept.namespace, 0, kept.pieces[:2])
        with stopped(server):
            assert client.reserve(lost.namespace, 0, [*lost.pieces, *kept.pieces]).num_tokens == 0
        wait_until(lambda: client.connected, "it is used again")
        wait_until(lambda: other.stats().get("l1", {}).get("reservations") == 2, "only the first one is left")
        fill(mine)
        client.commit(mine)
        assert look(client, "r", kept) == 2 * CHUNK_SIZE
        assert store(client, lost) == 200


def test_a_pool_connection_shows_who_lives_while_nobody_speaks(server: ForkedServer) -> None:
    asked = prompt(200, seed=1)
    with connect(server.endpoint) as client:
        other = connect(server.endpoint)
        store(client, asked)
        other.lookup("r", asked.namespace, asked.prefix)
        with stopped(server):
            other.close()
        wait_until(lambda: client.connected and client.stats()["sessions"] == 1, "its end was seen")
        assert client.stats()["l1"]["lookups"] == 0
