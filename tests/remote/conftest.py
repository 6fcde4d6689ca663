from __future__ import annotations

from collections.abc import Iterator

import pytest
from raw_client import RawClient

from kvstrata.testing.remote_server import RemoteServerThread


@pytest.fixture(scope="module")
def remote_server() -> Iterator[RemoteServerThread]:
    with RemoteServerThread() as server:
        yield server


@pytest.fixture
def raw(remote_server: RemoteServerThread) -> Iterator[RawClient]:
    with RawClient(remote_server.port) as client:
        yield client
