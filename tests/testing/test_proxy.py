"""The proxy does what it is told, while it is told so."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvstrata.testing.proxy import BLACK_HOLE, REFUSING, Flow, Link, Proxy, far_away, slow_link
from kvstrata.testing.waiting import wait_until


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        yield listener


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[Proxy]:
    with Proxy(listener.getsockname()) as proxy:
        yield proxy


@contextlib.contextmanager
def connected(proxy: Proxy, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's socket and the server's."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client:
        server, _ = listener.accept()
        with server:
            server.settimeout(20)
            yield client, server


def receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (piece := sock.recv(count - len(data))):
        data += piece
    return bytes(data)


def send_in_thread(sock: socket.socket, data: bytes) -> threading.Thread:
    def send() -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_bytes_pass_in_both_directions_and_so_do_ends(proxy: Proxy, listener: socket.socket) -> None:
    data = bytes(range(256)) * 40_000
    with connected(proxy, listener) as (client, server):
        sender = send_in_thread(client, data)
        assert receive(server, len(data)) == data
        sender.join()
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        sender = send_in_thread(server, data[::-1])
        assert receive(client, len(data)) == data[::-1]
        sender.join()
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        wait_until(lambda: proxy.num_connections == 0, "the connection is over")


def test_several_connections_at_once(proxy: Proxy, listener: socket.socket) -> None:
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(connected(proxy, listener)) for _ in range(10)]
        wait_until(lambda: proxy.num_connections == 10, "all are accepted")
        for number, (client, _) in enumerate(ends):
            client.sendall(b"%d" % number)
        assert [server.recv(10) for _, server in ends] == [b"%d" % number for number in range(10)]
    wait_until(lambda: proxy.num_connections == 0, "all are over")


def test_a_delay_comes_once_however_many_bytes(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = slow_link(0.2)
    with connected(proxy, listener) as (client, server):
        started = time.monotonic()
        sender = send_in_thread(client, bytes(4_000_000))
        assert len(receive(server, 4_000_000)) == 4_000_000
        assert time.monotonic() - started >= 0.1
        server.sendall(b"x")
        assert client.recv(1) == b"x"
        assert time.monotonic() - started >= 0.2
        sender.join()


def test_a_bandwidth_is_kept(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = Link(to_client=Flow(bytes_per_second=1_000_000))
    with connected(proxy, listener) as (client, server):
        started = time.monotonic()
        sender = send_in_thread(server, bytes(500_000))
        assert len(receive(client, 500_000)) == 500_000
        assert time.monotonic() - started >= 0.35  # some of it may go at once
        sender.join()


def test_connections_share_a_bandwidth_and_take_turns(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = BLACK_HOLE
    with connected(proxy, listener) as one, connected(proxy, listener) as other:
        senders = [send_in_thread(server, bytes(300_000)) for _, server in (one, other)]
        time.sleep(0.1)  # neither is to have the link for itself at first
        started = time.monotonic()
        proxy.link = slow_link(0, bytes_per_second=1_000_000, shared=True)
        ends = []
        for client, _ in (one, other):
            assert len(receive(client, 300_000)) == 300_000
            ends.append(time.monotonic() - started)
        assert ends[0] >= 0.45, "it had half of the bandwidth"
        assert ends[1] >= 0.55
        for sender in senders:
            sender.join()


def test_a_reset_after_so_many_bytes(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = Link(to_client=Flow(reset_after_bytes=1000))
    with connected(proxy, listener) as (client, server):
        sender = send_in_thread(server, bytes(100_000))
        received: list[bytes] = []
        with pytest.raises(ConnectionResetError):
            received.extend(iter(lambda: client.recv(100_000), b""))
        assert len(b"".join(received)) <= 1000
        sender.join()
        wait_until(lambda: proxy.num_connections == 0, "it is forgotten")


def test_a_half_close_leaves_the_other_direction(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = Link(to_client=Flow(end_after_bytes=10))
    with connected(proxy, listener) as (client, server):
        server.sendall(b"0123456789abc")
        assert receive(client, 100) == b"0123456789"
        client.sendall(b"still here")
        assert receive(server, 10) == b"still here"


def test_bits_are_flipped_at_the_stated_rate(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = Link(to_server=Flow(flip_every_bytes=1000))
    with connected(proxy, listener) as (client, server):
        sender = send_in_thread(client, bytes(100_000))
        data = receive(server, 100_000)
        sender.join()
    changed = [at for at, byte in enumerate(data) if byte]
    assert changed == list(range(999, 100_000, 1000))
    assert all(data[at].bit_count() == 1 for at in changed)


def test_what_a_rewrite_returns_is_passed_on(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = Link(to_client=Flow(rewrite=lambda piece: piece.replace(b"yes", b"perhaps")))
    with connected(proxy, listener) as (client, server):
        server.sendall(b"yes!")
        assert receive(client, 8) == b"perhaps!"


def test_a_black_hole_accepts_and_lets_go_when_it_ends(proxy: Proxy, listener: socket.socket) -> None:
    proxy.link = BLACK_HOLE
    with connected(proxy, listener) as (client, server):
        client.sendall(b"anybody?")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.recv(1)
        proxy.link = Link()
        server.settimeout(20)
        assert receive(server, 8) == b"anybody?"


def test_refusing_resets_what_there_is_and_keeps_the_port(proxy: Proxy, listener: socket.socket) -> None:
    with connected(proxy, listener) as (client, _):
        for _ in range(3):
            proxy.link = REFUSING
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
            proxy.link = Link()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connected(proxy, listener) as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_server_that_is_not_there_resets(listener: socket.socket) -> None:
    address = listener.getsockname()
    listener.close()
    with Proxy(address) as proxy:
        with (  # the RST may come before the connection is reported
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as client,
        ):
            client.recv(1)
        with socket.create_server(("127.0.0.1", 0)) as other:
            proxy.redirect(other.getsockname())
            with connected(proxy, other) as (client_end, server):
                server.sendall(b"x")
                assert client_end.recv(1) == b"x"


def test_closing_ends_connections_with_bytes_on_their_way(proxy: Proxy, listener: socket.socket) -> None:
    with connected(proxy, listener) as (client, server):
        proxy.link = BLACK_HOLE
        sender = send_in_thread(server, bytes(20_000_000))
        proxy.close()
        proxy.close()
        sender.join()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_proxy_in_a_process_of_its_own(listener: socket.socket) -> None:
    with (
        far_away(listener.getsockname()[1], 0.1) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        server, _ = listener.accept()
        with server:
            started = time.monotonic()
            client.sendall(b"there")
            assert receive(server, 5) == b"there"
            server.sendall(b"and back")
            assert receive(client, 8) == b"and back"
            assert time.monotonic() - started >= 0.1
