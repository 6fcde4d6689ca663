import os
import select
import socket
import stat
import subprocess
import sys
import threading

import pytest

from kvstrata.errors import PoolError
from kvstrata.memory import handover
from kvstrata.memory.handover import PoolServer, fetch_pool, read_session
from kvstrata.memory.region import SharedRegion

SIZE = 1 << 20


@pytest.fixture
def region():
    region = SharedRegion.create(SIZE)
    yield region
    region.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "pool.sock"


@pytest.fixture
def server(region, path):
    server = PoolServer(path, region, "pool-1")
    yield server
    server.close()


class Fetch:
    """A client in a thread, while the test serves."""

    def __init__(self, path, session="session", timeout_seconds=5.0):
        self.result = self.error = None
        self._thread = threading.Thread(target=self._run, args=(path, session, timeout_seconds))
        self._thread.start()

    def _run(self, path, session, timeout_seconds):
        try:
            self.result = fetch_pool(path, session, timeout_seconds)
        except PoolError as error:
            self.error = error

    def join(self):
        self._thread.join()
        return self

    def close(self):
        self.join()
        os.close(self.result.fd)
        self.result.connection.close()


def readable(waiting):
    return bool(select.select([waiting], [], [], 5.0)[0])


def serve_when_asked(server):
    assert readable(server)
    return server.serve_one()


def test_a_client_maps_the_same_memory(server, region, path):
    fetch = Fetch(path)
    with serve_when_asked(server):
        handle = fetch.join().result
        assert (handle.size_bytes, handle.pool_id) == (SIZE, "pool-1")
        assert not os.get_inheritable(handle.fd)
        other = SharedRegion.attach(handle.fd, handle.size_bytes)
        other.view[:3] = b"abc"
        assert bytes(region.view[:3]) == b"abc"
        other.close()
        handle.connection.close()


def test_the_connection_says_the_session_and_then_when_its_client_is_gone(server, path):
    fetch = Fetch(path, "session-7")
    with serve_when_asked(server) as connection:
        assert readable(connection)
        assert read_session(connection) == "session-7"
        assert read_session(connection) == ""
        fetch.close()
        assert readable(connection)
        assert read_session(connection) is None


def test_a_client_that_is_killed_is_seen_to_be_gone(server, path):
    code = (
        "import os, signal, sys\n"
        "from kvstrata.memory.handover import fetch_pool\n"
        "handle = fetch_pool(sys.argv[1], 'victim', 10.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        assert select.select([server], [], [], 30.0)[0]
        with server.serve_one() as connection:
            assert readable(connection)
            assert read_session(connection) == "victim"
            assert readable(connection)
            assert read_session(connection) is None
    finally:
        child.kill()
        assert child.wait() == -9


def test_socket_and_directory_are_for_the_owner_only(server, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_nobody_waiting_is_no_reason_to_wait(server):
    assert server.serve_one() is None


def test_a_client_that_went_away_disturbs_nobody(server, path):
    gone = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gone.connect(str(path))
    gone.close()
    connection = server.serve_one()
    if connection is not None:
        assert read_session(connection) is None
        connection.close()
    fetch = Fetch(path)
    with serve_when_asked(server):
        fetch.close()


def test_many_clients_at_once(server, path):
    fetches = [Fetch(path) for _ in range(20)]
    connections = [serve_when_asked(server) for _ in fetches]
    for fetch, connection in zip(fetches, connections, strict=True):
        fetch.close()
        connection.close()


def test_another_user_is_refused_and_told(server, path, monkeypatch, caplog):
    monkeypatch.setattr(handover, "_trusted", lambda _: False)
    with pytest.raises(PoolError, match="belongs to user"):
        fetch_pool(path, "session", 5.0)
    assert serve_when_asked(server) is None
    assert "refused" in caplog.text


def test_a_refused_client_gets_no_descriptor(server, path, monkeypatch):
    # The client, in its thread, trusts the server; the server does not trust the client.
    in_client = lambda _: threading.current_thread() is not threading.main_thread()  # noqa: E731
    monkeypatch.setattr(handover, "_trusted", in_client)
    fetch = Fetch(path)
    assert serve_when_asked(server) is None
    assert "refused" in str(fetch.join().error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_real_other_user_is_refused(server, path):
    path.parent.chmod(0o755)
    path.chmod(0o666)
    directory = os.open(path.parent, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            os.fchdir(directory)
            os.setresuid(65534, 65534, 65534)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.settimeout(5.0)
            connection.connect(path.name)
            os._exit(0 if connection.recv(100) == b"" else 1)
        finally:
            os._exit(2)
    os.close(directory)
    assert serve_when_asked(server) is None
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_server_that_does_not_answer_is_not_waited_for_long(server, path):
    with pytest.raises(PoolError, match="timed out"):
        fetch_pool(path, "session", 0.05)


def test_no_server_at_all(path):
    with pytest.raises(PoolError, match="no L1 pool"):
        fetch_pool(path, "session", 1.0)


@pytest.mark.parametrize(
    "message",
    [
        b"HTTP/1.1 400 Bad Request, and more",
        b"KVSP",
        handover._HEADER.pack(b"KVSP", 2, 0, 10),
        handover._HEADER.pack(b"KVSP", 1, 0, 10),
        handover._HEADER.pack(b"KVSP", 1, 5, 10) + b"abc",
    ],
)
def test_another_kind_of_answer_is_refused(path, message):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        fetch = Fetch(path)
        client, _ = listener.accept()
        with client:
            client.sendall(message)
            assert isinstance(fetch.join().error, PoolError)


def test_the_socket_of_a_dead_server_is_replaced(region, path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
        dead.listen()
    server = PoolServer(path, region, "pool-2")
    fetch = Fetch(path)
    with serve_when_asked(server):
        assert fetch.join().result.pool_id == "pool-2"
        fetch.close()
    server.close()
    server.close()
    assert not path.exists()


def test_the_socket_of_a_living_server_is_left_alone(server, region, path):
    with pytest.raises(PoolError, match="another kvstrata server"):
        PoolServer(path, region, "pool-2")
    assert path.exists()


def test_a_file_that_is_no_socket_is_left_alone(region, path):
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(PoolError, match="no socket"):
        PoolServer(path, region, "pool-1")
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_is_said(region, tmp_path):
    with pytest.raises(PoolError, match="longer than"):
        PoolServer(tmp_path / ("x" * 120), region, "pool-1")


def test_close_leaves_the_socket_of_a_successor(region, path):
    first = PoolServer(path, region, "pool-1")
    path.unlink()
    second = PoolServer(path, region, "pool-2")
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()
