from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import threading
import time

import pytest

from kvstrata.errors import TierUnavailable
from kvstrata.tiers import sockets


def test_a_name_server_that_does_not_answer_costs_no_more_than_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = threading.Event()
    real = socket.getaddrinfo

    def slow(host: str, *args: object, **options: object) -> object:
        if not options.get("flags"):
            answer.wait(10)
        return real("127.0.0.1" if not options.get("flags") else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"cache\.example"):
        sockets.resolve("cache.example", 1, started + 0.2)
    assert time.monotonic() - started < 5
    answer.set()
    assert sockets.resolve("cache.example", 7, time.monotonic() + 5)[0][1] == ("127.0.0.1", 7)


def test_one_thread_asks_for_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    asked: list[str] = []
    real = socket.getaddrinfo

    def slow(host: str, *args: object, **options: object) -> object:
        if options.get("flags"):
            return real(host, *args, **options)
        asked.append(host)
        answer.wait(10)
        return real("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            sockets.resolve("cache.example", 1, time.monotonic() + 0.05)
    threading.Timer(0.05, answer.set).start()
    assert sockets.resolve("cache.example", 1, time.monotonic() + 5)[0][1] == ("127.0.0.1", 1)
    assert asked == ["cache.example"]
    assert sockets.resolve("cache.example", 1, time.monotonic() + 5)
    assert len(asked) == 2, "nothing is kept"


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example"])
def test_what_is_no_host_name_is_an_error_of_the_system(host: str) -> None:
    with pytest.raises(OSError, match=r"host name|known|long"):
        sockets.resolve(host, 1, time.monotonic() + 5)


def test_an_unknown_host_is_an_error_of_the_system() -> None:
    with pytest.raises(OSError, match=r"known|failure"):
        sockets.resolve("no-such-host.invalid", 1, time.monotonic() + 5)


def test_the_next_address_is_tried() -> None:
    with socket.socket() as listener, socket.socket() as unused:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        unused.bind(("127.0.0.1", 0))  # bound, not listening: refused
        addresses = [(socket.AF_INET, unused.getsockname()), (socket.AF_INET, listener.getsockname())]
        with sockets.connect(addresses, time.monotonic() + 5) as sock:
            assert sock.getpeername() == listener.getsockname()
        with pytest.raises(ConnectionRefusedError):
            sockets.connect(addresses[:1], time.monotonic() + 5)


def test_an_address_that_hangs_leaves_time_for_the_next() -> None:
    """As a lost host of several does, or an IPv6 route that leads nowhere: nobody answers the first packet."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        answering = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        addresses = [(socket.AF_INET, each.getsockname()) for each in (full, answering)]
        deadline = time.monotonic() + 2
        with sockets.connect(addresses, deadline) as sock:
            assert time.monotonic() < deadline, "there is time to log in"
            assert sock.getpeername() == answering.getsockname()


def test_a_peer_that_resets_before_the_handshake_leaves_no_socket() -> None:
    """``ssl`` forgets one then: a ResourceWarning, which is an error in these tests."""
    context = ssl.create_default_context()
    context.sslsocket_class = sockets._TLSSocket
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        assert poll.poll(5000)
        descriptor = sock.fileno()
        with pytest.raises(ConnectionResetError):
            context.wrap_socket(sock, server_hostname="127.0.0.1")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_a_peer_that_is_slow_but_goes_on_does_not_make_a_send_outlast_its_deadline(family: int) -> None:
    if family == socket.AF_UNIX:
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
    hung_up = threading.Event()

    def take_slowly() -> None:
        while theirs.recv(32 << 10):
            hung_up.wait(0.005)

    thread = threading.Thread(target=take_slowly)
    with ours, theirs:
        connection = sockets.DeadlineSocket(ours, "peer")
        thread.start()
        connection.start(0.2)
        with pytest.raises(TierUnavailable, match="deadline"):
            connection.send([bytes(32 << 20)])  # five seconds and more at that rate
        assert connection.closed
        hung_up.set()
        thread.join()
