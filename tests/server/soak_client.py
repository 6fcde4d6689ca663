"""A client of a server for the soak test: ``soak_client.py URL SALT SEED SECONDS``; prints what it did as JSON."""

from __future__ import annotations

import json
import random
import sys
import time

from kvstrata.client import RemoteClient
from kvstrata.testing import guard
from kvstrata.testing.client import CHUNK_SIZE, Prompt, fill, make_namespace, payload_of, prompt, wait_lookup

_NUM_PROMPTS = 40
_SESSION_SECONDS = 3.0
"""Then the client goes, and another one comes."""


def step(client: RemoteClient, asked: Prompt, request_id: str, rng: random.Random) -> tuple[int, int]:
    """One request; the tokens that it hit, and the payloads that were wrong."""
    hit = wait_lookup(client, request_id, asked)
    payloads = client.payloads(request_id, 0, hit, asked.namespace) or []
    wrong = sum(
        bytes(payload) != payload_of(piece, 0, len(payload))
        for piece, payload in zip(hit.pieces, payloads, strict=False)
    )
    client.release(request_id)
    if hit.num_tokens < len(asked):
        reservation = client.reserve(asked.namespace, 0, asked.pieces)
        fill(reservation)
        end = client.abort if rng.random() < 0.1 else client.commit
        end(reservation)
    return hit.num_tokens, wrong


def main(url: str, salt: str, seed: int, seconds: float) -> None:
    rng = random.Random(seed)
    space = make_namespace()
    prompts = [prompt(CHUNK_SIZE * (1 + n % 5) + 7 * (n % 3), n, space, salt) for n in range(_NUM_PROMPTS)]
    requests = hit_tokens = wrong = 0
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        with RemoteClient(url, f"soak {seed}", timeout_seconds=5) as client:
            assert client.wait_connected(20)
            leaves_at = min(ends_at, time.monotonic() + _SESSION_SECONDS)
            while time.monotonic() < leaves_at:
                tokens, bad = step(client, rng.choice(prompts), f"{seed}-{requests}", rng)
                requests, hit_tokens, wrong = requests + 1, hit_tokens + tokens, wrong + bad
                time.sleep(0.01)
    json.dump({"requests": requests, "hit_tokens": hit_tokens, "wrong": wrong}, sys.stdout)


if __name__ == "__main__":
    guard.die_with_parent()
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
