"""A real server with its HTTP API in threads of this process, a client of it, and something that asks the API."""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kvstrata.client import RemoteClient
from kvstrata.config import Settings
from kvstrata.server.lifecycle import http_api
from kvstrata.server.server import Server

_PATIENCE_SECONDS = 20.0


class Answer(msgspec.Struct, frozen=True):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Api:
    """Asks an HTTP API."""

    def __init__(self, host: str, port: int, token: str | None = None) -> None:
        self.host, self.port = host, port
        self.token = token

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """One request on a connection of its own. ``body``: bytes as they are, anything else as JSON."""
        sent = {} if self.token is None else {"authorization": f"Bearer {self.token}"}
        if body is not None:
            sent["content-type"] = "application/json"
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_PATIENCE_SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, sent | (headers or {}))
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, told, response.read())

    def get(self, path: str) -> Any:
        """What a GET that must succeed answers."""
        answer = self.ask("GET", path)
        assert answer.status == 200, answer
        return answer.json

    def post(self, path: str, body: Any) -> Any:
        """What a POST that must succeed answers."""
        answer = self.ask("POST", path, body)
        assert answer.status in {200, 201, 202}, answer
        return answer.json

    def wait_job(self, job: Any) -> Any:
        """The job when it is over."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (report := self.get(f"/jobs/{job['id']}"))["state"] in {"waiting", "running"}:
            assert time.monotonic() < deadline, report
            time.sleep(0.01)
        return report


class Served(msgspec.Struct, frozen=True):
    """A running server."""

    server: Server
    client: RemoteClient
    """Connected to it over ZMQ, as an inference engine is."""
    api: Api


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Served]:
    """Run a server with ``settings`` and its HTTP API, both on free ports of loopback."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        server = Server(settings, endpoint="tcp://127.0.0.1:*", pool_socket=str(Path(directory) / "pool"))
        stack.callback(server.close)
        thread = threading.Thread(target=server.serve, name="kvstrata-test-server")
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.stop)
        url = stack.enter_context(http_api(server, settings, 0))
        assert url is not None, "the extra 'http' is not installed"
        host, _, port = url.removeprefix("http://").rpartition(":")
        token = None
        if settings.http_token_file is not None:
            token = Path(settings.http_token_file).read_text().strip()
        client = RemoteClient(server.endpoint, "test", timeout_seconds=10)
        stack.callback(client.close)
        assert client.wait_connected(_PATIENCE_SECONDS)
        yield Served(server, client, Api(host, int(port), token))
