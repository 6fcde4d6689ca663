"""Metrics under concurrency add up exactly: tokens hit, by tier, and missed are the tokens asked for."""

from __future__ import annotations

import random
import threading
from pathlib import Path

from kvstrata.client import LocalClient
from kvstrata.testing.client import CHUNK_SIZE, make_namespace, prompt, small_settings, store

SPACE = make_namespace()
NUM_THREADS = 6
NUM_ROUNDS = 40
PROMPTS = [prompt(3 * CHUNK_SIZE + 7 * seed, seed, SPACE) for seed in range(30)]


def test_tokens_hit_and_missed_are_the_tokens_asked_for(tmp_path: Path) -> None:
    asked, answered, errors = [0] * NUM_THREADS, [0] * NUM_THREADS, []

    def work(thread: int) -> None:
        rng = random.Random(thread)
        try:
            for number in range(NUM_ROUNDS):
                wanted = rng.choice(PROMPTS)
                hit = client.wait_lookup(f"{thread}-{number}", SPACE, wanted.prefix)
                asked[thread] += len(wanted)
                answered[thread] += hit.num_tokens
                client.release(f"{thread}-{number}")
                if hit.num_tokens < len(wanted):
                    store(client, wanted)
                if number % 17 == 5:
                    client.clear(SPACE, tiers=False)
        except Exception as error:  # noqa: BLE001  shown by the test's thread
            errors.append(error)

    with LocalClient(small_settings(local_disk=str(tmp_path))) as client:
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(NUM_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        totals = client.stats()["totals"]
    assert errors == []
    assert totals["lookups"] == NUM_THREADS * NUM_ROUNDS
    assert totals["lookup_tokens"] == sum(asked)
    assert sum(totals["hit_tokens"].values()) == sum(answered)
    assert sum(totals["hit_tokens"].values()) + sum(totals["miss_tokens"].values()) == sum(asked)
    assert all(count > 0 for count in totals["hit_tokens"].values())
    assert sum(totals["misses"].values()) > 0
