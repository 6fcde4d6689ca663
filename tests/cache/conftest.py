from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstrata.testing.redis_server import RedisServer, server_binary


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer | None]:
    """A real server; None where there is no program for it."""
    if server_binary() is None:
        yield None
        return
    with RedisServer() as server:
        yield server
