"""Clients that are killed at any instant leave nothing behind at the server, and nothing visible."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvstrata.client import RemoteClient
from kvstrata.testing.client import fill, look, prompt, small_settings, store
from kvstrata.testing.forked import ForkedServer, ServerHost
from kvstrata.testing.waiting import wait_until

CHILD = """
import sys
from kvstrata.client import RemoteClient
from kvstrata.testing.client import fill, look, prompt, store
from kvstrata.testing.guard import die_with_parent

die_with_parent()
client = RemoteClient(sys.argv[1], "victim", timeout_seconds=10, map_pool=sys.argv[3] == "map")
assert client.wait_connected(10)
print("ready", flush=True)
if sys.argv[2] == "reserve":
    asked = prompt(325, seed=1)
    reservation = client.reserve(asked.namespace, 0, asked.pieces)
    assert reservation.num_tokens == 325
    for buffer in reservation.buffers[:2]:
        buffer[:] = b"x" * len(buffer)
elif sys.argv[2] == "lookup":
    asked = prompt(200, seed=2)
    assert client.lookup("r", asked.namespace, asked.prefix).num_tokens == 200
else:
    number = 0
    while True:
        number += 1
        asked = prompt(325, seed=number % 7)
        look(client, str(number), asked)
        store(client, asked)
        if number % 50 == 49:
            client.clear()
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server(server_host: ServerHost) -> Iterator[ForkedServer]:
    with server_host.start(small_settings()) as server:
        yield server


@pytest.fixture
def client(server: ForkedServer) -> Iterator[RemoteClient]:
    with RemoteClient(server.endpoint, "witness", timeout_seconds=10) as client:
        assert client.wait_connected(10)
        yield client


@contextmanager
def victim(server: ForkedServer, what: str, how: str = "map") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, server.endpoint, what, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


def nothing_is_held(client: RemoteClient) -> bool:
    stats = client.stats()
    l1 = stats["l1"]
    return (stats["sessions"], l1["lookups"], l1["reservations"]) == (1, 0, 0)


@pytest.mark.parametrize("how", ["map", "inline"])
def test_killed_between_reserve_and_commit(server: ForkedServer, client: RemoteClient, how: str) -> None:
    asked = prompt(325, seed=1)
    with victim(server, "reserve", how) as process:
        wait_for(process, "ready")
        wait_for(process, "done")
        assert client.stats()["l1"]["reservations"] == len(asked.pieces)
        assert client.reserve(asked.namespace, 0, asked.pieces).num_tokens == 0
        assert look(client, "r", asked) == 0
        process.kill()
    wait_until(lambda: nothing_is_held(client), "its slots are taken back")
    assert client.stats()["l1"]["used_bytes"] == 0
    assert look(client, "r", asked) == 0
    assert store(client, asked) == 325
    assert look(client, "r", asked) == 325


def test_a_slot_is_not_taken_back_while_its_writer_may_write(
    server: ForkedServer, client: RemoteClient
) -> None:
    """A fork of the victim still maps the pool when the victim itself is dead."""
    fork = CHILD.replace(
        'print("done"',
        'import os, time\nif os.fork() == 0:\n    time.sleep(20)\n    os._exit(0)\nprint("done"',
    ).replace("die_with_parent()\n", "")
    with subprocess.Popen(
        [sys.executable, "-c", fork, server.endpoint, "reserve", "map"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(process, "ready")
        wait_for(process, "done")
        (child,) = (
            int(pid)
            for pid in subprocess.run(
                ["ps", "--ppid", str(process.pid), "-o", "pid="], check=True, capture_output=True, text=True
            ).stdout.split()
        )
        process.kill()
        process.wait()
        for _ in range(10):
            assert client.stats()["l1"]["reservations"] > 0
            time.sleep(0.02)
        subprocess.run(["kill", "-9", str(child)], check=True)
        wait_until(lambda: nothing_is_held(client), "its slots are taken back")


def test_killed_while_it_holds_a_lease(server: ForkedServer, client: RemoteClient) -> None:
    store(client, prompt(200, seed=2))
    with victim(server, "lookup") as process:
        wait_for(process, "ready")
        wait_for(process, "done")
        assert client.stats()["l1"]["lookups"] == 1
        process.kill()
    wait_until(lambda: nothing_is_held(client), "its lease has ended")
    client.clear()
    assert client.stats()["l1"]["used_bytes"] == 0


def kill_again_and_again(server: ForkedServer, client: RemoteClient, rounds: int) -> None:
    rng = random.Random(rounds)
    for number in range(rounds):
        with victim(server, "work", rng.choice(["map", "inline"])) as process:
            wait_for(process, "ready")
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        wait_until(lambda: nothing_is_held(client), "nothing is held")
        for seed in range(7):
            asked = prompt(325, seed=seed)
            look(client, f"{number} {seed}", asked)
            reservation = client.reserve(asked.namespace, 0, asked.pieces)
            fill(reservation)
            client.commit(reservation)
            assert look(client, f"again {number} {seed}", asked) == 325
    client.clear()
    assert client.stats()["l1"]["used_bytes"] == 0
    assert "Traceback" not in server.log_path.read_text()


def test_killed_at_random_instants(server: ForkedServer, client: RemoteClient) -> None:
    kill_again_and_again(server, client, rounds=5)


@pytest.mark.slow
def test_killed_at_random_instants_many_times(server: ForkedServer, client: RemoteClient) -> None:
    kill_again_and_again(server, client, rounds=100)
