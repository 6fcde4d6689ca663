import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading

import pytest

from kvstrata import __version__
from kvstrata.errors import ConfigError
from kvstrata.http.serve import HttpServer
from kvstrata.metrics import Metrics


class Source:
    """A source whose answers the test sets."""

    def __init__(self):
        self.registry = Metrics()
        self.state = {"status": "ok", "tiers": {"disk": "up"}}
        self.figures = {"l1": {"entries": 3}, "tiers": [{"name": "disk", "entries": None}]}
        self.waiting = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def metrics(self):
        return self.registry.render()

    def health(self):
        return self.state

    def stats(self):
        self.waiting.set()
        self.go_on.wait(10)
        return self.figures


@contextlib.contextmanager
def serving(source, **arguments):
    server = HttpServer(source, port=0, **arguments)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def get(server, path):
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def test_health_answers_while_all_threads_wait_for_something():
    source = Source()
    source.go_on.clear()
    with serving(source) as server:
        threads = [threading.Thread(target=get, args=(server, "/stats")) for _ in range(50)]
        for thread in threads:
            thread.start()
        try:
            for path in ("/health", "/ready"):
                connection = http.client.HTTPConnection(server.host, server.port, timeout=5)
                with contextlib.closing(connection):
                    connection.request("GET", path)
                    assert connection.getresponse().status == 200
        finally:
            source.go_on.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize(("status", "code"), [("ok", 200), ("degraded", 200), ("stopping", 503)])
def test_health_has_a_status_code_and_the_state_of_every_tier(status, code):
    source = Source()
    source.state = {"status": status, "tiers": {"disk": "up", "redis": "down"}}
    with serving(source) as server:
        got, _, body = get(server, "/health")
    assert got == code
    assert json.loads(body) == source.state


def test_metrics_are_in_the_text_format():
    source = Source()
    source.registry.stored(256, 4096)
    with serving(source) as server:
        status, headers, body = get(server, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"\nkvstrata_stored_tokens_total 256.0\n" in body


def test_stats_and_version():
    source = Source()
    with serving(source) as server:
        assert json.loads(get(server, "/stats")[2]) == source.figures
        assert json.loads(get(server, "/version")[2]) == {"version": __version__}


def test_what_it_does_not_have_is_not_found_and_nothing_loads_scripts_from_elsewhere():
    with serving(Source()) as server:
        for path in ("/nothing", "/docs", "/redoc"):
            assert get(server, path)[0] == 404


def test_it_listens_on_loopback_only_unless_told_otherwise():
    server = HttpServer(Source(), port=0)
    server.start()
    try:
        assert server.host == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", server.port), timeout=5).close()
    finally:
        server.stop()


def test_a_port_in_use_is_one_clear_line():
    with serving(Source()) as first:
        second = HttpServer(Source(), port=first.port)
        with pytest.raises(ConfigError) as caught:
            second.start()
        second.stop()
        message = str(caught.value)
        assert f"127.0.0.1:{first.port}" in message
        assert "already in use" in message
        assert "http_port" in message
        assert "\n" not in message
        assert get(first, "/version")[0] == 200


def test_a_free_port_does_where_that_is_said(caplog):
    with serving(Source()) as first:
        second = HttpServer(Source(), port=first.port, or_free_port=True)
        second.start()
        try:
            assert second.port not in (0, first.port)
            assert get(second, "/version")[0] == 200
        finally:
            second.stop()
    assert any(f"http_port {first.port} is in use" in message for message in caplog.messages)


@pytest.mark.parametrize("host", ["no such host", "192.0.2.1"])
def test_an_address_that_is_not_ours_is_a_clear_error(host):
    with pytest.raises(ConfigError, match=host):
        HttpServer(Source(), host=host, port=0).start()


def test_the_port_is_free_again_at_once():
    with serving(Source()) as server:
        get(server, "/version")
        port = server.port
    again = HttpServer(Source(), port=port)
    again.start()
    again.stop()
    again.stop()


def test_a_request_in_progress_is_answered_before_the_end():
    source = Source()
    source.go_on.clear()
    server = HttpServer(source, port=0)
    server.start()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(get(server, "/stats")))
    asking.start()
    assert source.waiting.wait(10)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    source.go_on.set()
    stopping.join()
    asking.join()
    assert answers[0][0] == 200


def test_several_requests_are_answered_at_once():
    source = Source()
    source.go_on.clear()
    with serving(source) as server:
        asking = threading.Thread(target=lambda: get(server, "/stats"))
        asking.start()
        assert source.waiting.wait(10)
        assert get(server, "/health")[0] == 200
        source.go_on.set()
        asking.join()


def test_a_fault_of_the_source_is_a_500_and_the_server_goes_on():
    source = Source()
    source.state = {}
    with serving(source) as server:
        assert get(server, "/health")[0] == 500
        assert get(server, "/version")[0] == 200


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra_it_is_an_import_error_that_names_what_is_missing(missing):
    """Who imports it (the server) turns this into a line that names the extra."""
    code = f"import sys; sys.modules[{missing!r}] = None; import kvstrata.http.serve"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError", "ModuleNotFoundError"))
    assert missing in last
