"""The client contract over sockets, with the server in another process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.client import RemoteClient
from kvstrata.config import Settings
from kvstrata.testing.client import (
    Join,
    Prompt,
    SharedClientContract,
    Start,
    look,
    prompt,
    small_settings,
    store,
    wait_lookup,
)
from kvstrata.testing.forked import ForkedServer, ServerHost
from kvstrata.types import Hit

Servers = list[ForkedServer]


@pytest.fixture
def servers() -> Servers:
    """Those that the test has started, the last one in use."""
    return []


class RemoteContract(SharedClientContract):
    def endpoint(self, host: ServerHost) -> str:
        """Where the next server is to listen."""
        raise NotImplementedError

    def connect(self, server: ForkedServer) -> RemoteClient:
        client = RemoteClient(server.endpoint, "test", timeout_seconds=10)
        assert client.wait_connected(10)
        return client

    def before_connecting(self, host: ServerHost) -> None:
        """Called when a server has started."""

    @pytest.fixture
    def start(self, server_host: ServerHost, plugin_path: Path, servers: Servers) -> Iterator[Start]:
        with contextlib.ExitStack() as stack:

            def start(settings: Settings) -> RemoteClient:
                server = server_host.start(
                    settings, endpoint=self.endpoint(server_host), plugin_path=str(plugin_path)
                )
                servers.append(stack.enter_context(server))
                self.before_connecting(server_host)
                return stack.enter_context(self.connect(server))

            yield start

    @pytest.fixture
    def join(self, servers: Servers, start: Start) -> Iterator[Join]:
        with contextlib.ExitStack() as stack:
            yield lambda: stack.enter_context(self.connect(servers[-1]))


class TestOverTCP(RemoteContract):
    def endpoint(self, host: ServerHost) -> str:
        return "tcp://127.0.0.1:*"


class TestOverIPC(RemoteContract):
    def endpoint(self, host: ServerHost) -> str:
        return f"ipc://{host.directory}/control-{id(self)}"


class TestInline(RemoteContract):
    """Data through the socket; the pool's connection shows that the client lives."""

    def endpoint(self, host: ServerHost) -> str:
        return "tcp://127.0.0.1:*"

    def connect(self, server: ForkedServer) -> RemoteClient:
        client = RemoteClient(server.endpoint, "test", timeout_seconds=10, map_pool=False)
        assert client.wait_connected(10)
        return client


def test_a_server_that_hangs_again_is_left_alone(
    server_host: ServerHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, settings = prompt(200, seed=1), small_settings()
    endpoint = f"ipc://{server_host.directory}/hanging"
    monkeypatch.setattr("kvstrata.client.remote._AWAY_TIMEOUTS", 10_000)
    with (
        RemoteClient(endpoint, "test", timeout_seconds=10) as client,
        server_host.start(settings, endpoint=endpoint) as server,
    ):

        def hang() -> None:
            assert client.wait_connected(10)
            server.send(signal.SIGSTOP)
            with monkeypatch.context() as patch:
                patch.setattr(client, "_timeout_seconds", 0.1)
                assert not client.lookup("r", asked.namespace, asked.prefix).num_tokens
            server.send(signal.SIGCONT)

        hang()
        hang()
        assert not client.wait_connected(0.5)
        server.end()
        with server_host.start(settings, endpoint=endpoint):
            assert client.wait_connected(10), "another one is not made to wait"
            assert look(client, "again", asked) == 0


class TestFromAnotherHost(RemoteContract):
    """The pool cannot be reached: data through the socket, and nothing else shows that the client lives."""

    def endpoint(self, host: ServerHost) -> str:
        return "tcp://127.0.0.1:*"

    def before_connecting(self, host: ServerHost) -> None:
        for path in host.directory.glob("*.pool"):
            path.unlink()

    def _found(self, start: Start) -> tuple[RemoteClient, Prompt, Hit]:
        """A client, and what it has stored and found again."""
        client = start(small_settings())
        assert isinstance(client, RemoteClient)
        asked = prompt(200, seed=1)
        store(client, asked)
        return client, asked, wait_lookup(client, "r", asked)

    def test_loads_of_one_step_do_not_add_up_their_waits(
        self, start: Start, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, asked, hit = self._found(start)
        servers[-1].end()
        waits: list[float] = []
        monkeypatch.setattr(client, "wait_connected", waits.append)
        for _ in range(5):
            assert client.payloads("r", 0, hit, asked.namespace) is None
        assert [seconds > 0 for seconds in waits] == [True, False, False, False, False]

    def test_a_load_waits_again_for_a_server_that_had_returned(
        self, start: Start, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, asked, hit = self._found(start)
        monkeypatch.setattr(client, "_timeout_seconds", 0.05)
        servers[-1].send(signal.SIGSTOP)
        for _ in range(2):
            assert client.payloads("r", 0, hit, asked.namespace) is None
        monkeypatch.undo()
        servers[-1].send(signal.SIGCONT)
        assert client.wait_connected(10)
        assert look(client, "again", asked) == 200
        servers[-1].end()
        waits: list[float] = []
        monkeypatch.setattr(client, "wait_connected", waits.append)
        assert client.payloads("r", 0, hit, asked.namespace) is None
        assert waits
        assert waits[0] > 0
