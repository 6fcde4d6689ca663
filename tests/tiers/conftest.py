from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvstrata.testing.redis_server import RedisServer, server_binary


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def password_server() -> Iterator[RedisServer]:
    """Its password has what a URL must escape. ``reader`` may only read, ``off_limits`` not log in."""
    users = ["user reader on >reading ~* +get +exists +ping +info +select", "user off_limits off >x ~* +@all"]
    with RedisServer(users, password="s3cret/p@ss:w#rd%") as server:
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("cryptography", reason="system: needs the package cryptography")
    if server_binary(tls=True) is None:
        pytest.skip("system: needs redis-server with TLS in PATH")
    from kvstrata.testing.tls import Certificates  # noqa: PLC0415 - needs cryptography

    return Certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def tls_server(certificates: Any) -> Iterator[Any]:
    from kvstrata.testing.tls import TLSServer  # noqa: PLC0415 - needs cryptography

    with TLSServer(certificates, "server", client_certificates=False) as server:
        yield server


@pytest.fixture(scope="session")
def strict_tls_server(certificates: Any) -> Iterator[Any]:
    """Its certificate is for another address, and it wants one of its clients."""
    from kvstrata.testing.tls import TLSServer  # noqa: PLC0415 - needs cryptography

    with TLSServer(certificates, "elsewhere", client_certificates=True) as server:
        yield server
