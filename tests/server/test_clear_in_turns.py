"""The server's one thread answers others while it clears."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstrata.client import RemoteClient
from kvstrata.testing.api import serving
from kvstrata.testing.client import CHUNK_SIZE, prompt, small_settings, store


def test_look_ups_are_answered_while_a_clear_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(small_settings(runtime_dir=str(tmp_path))) as served:
        stored = prompt(4 * CHUNK_SIZE, seed=1)
        store(served.client, stored)
        looked_up = threading.Event()
        clearing = served.server.cache.clearing

        def until_looked_up(*args: object, **options: bool) -> Iterator[int]:
            yield from clearing(*args, **options)  # type: ignore[arg-type]
            while not looked_up.is_set():
                yield 0

        monkeypatch.setattr(served.server.cache, "clearing", until_looked_up)
        other = RemoteClient(served.server.endpoint, "other", timeout_seconds=10)
        try:
            assert other.wait_connected(10)
            with ThreadPoolExecutor(2) as threads:
                cleared = [threads.submit(client.clear) for client in (served.client, other)]
                third = RemoteClient(served.server.endpoint, "third", timeout_seconds=10)
                try:
                    assert third.wait_connected(10)
                    assert third.lookup("r", stored.namespace, stored.prefix).num_tokens in (0, len(stored))
                finally:
                    third.close()
                assert not any(future.done() for future in cleared)
                looked_up.set()
                assert sum(future.result(10) for future in cleared) == 4
        finally:
            other.close()
        assert served.client.keys() == []
