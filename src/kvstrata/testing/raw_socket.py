"""The other side of the raw loop for TCP: a process that keeps frames by number, and does nothing else.

    python raw_socket.py

It prints its port, serves one connection, and ends with it. A request is an operation (``w``, ``r``), a number and
a size; ``w`` is followed by the frame and answered with a byte, ``r`` is answered with the frame.
"""

from __future__ import annotations

import socket
import struct

REQUEST = struct.Struct("<cIQ")
SOCKET_BYTES = 1 << 20


def tune(sock: socket.socket) -> None:
    """The options that our own connections have."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)


def receive(sock: socket.socket, view: memoryview) -> bool:
    """Fill ``view``; False at the end of the connection."""
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:], 0, socket.MSG_WAITALL)
        if count == 0:
            return False
        done += count
    return True


def serve() -> None:
    """Accept one connection and answer it until it ends."""
    frames: dict[int, memoryview] = {}
    head = memoryview(bytearray(REQUEST.size))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)  # noqa: T201 - how the other side learns it
        sock, _ = listener.accept()
    with sock:
        tune(sock)
        while receive(sock, head):
            operation, number, size = REQUEST.unpack(head)
            if operation == b"w":
                if len(frames.get(number, b"")) != size:
                    frames[number] = memoryview(bytearray(size))
                receive(sock, frames[number])
                sock.sendall(b"+")
            else:
                sock.sendall(frames[number])


if __name__ == "__main__":
    serve()
