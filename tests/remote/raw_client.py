"""A client of ``lm://`` as LMCache 0.5.6 writes it, byte for byte, with nothing of ours in it."""

from __future__ import annotations

import socket
import struct
from typing import Self

PUT, GET, EXIST, LIST, HEALTH = 1, 2, 3, 4, 5
KEY = "meta-llama/Llama-3.1-8B-Instruct@1@0@1f3c5a7b9d@half"
TENSOR = (1, 3, 0, 2, 32, 256, 1024)
"""Format KV_2LTD, bfloat16, no location, a shape."""


class RawClient:
    """Sends requests of 186 bytes, takes replies of 36. A context manager."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=20)

    def request(
        self, command: int, key: str | bytes = KEY, length: int = 0, form: tuple[int, ...] = (1, 2)
    ) -> None:
        raw = key if isinstance(key, bytes) else key.encode()
        form = (form + (0,) * 7)[:7]
        self.sock.sendall(struct.pack("iiiiiiiii150s", command, length, *form, raw.ljust(150)))

    def put(self, key: str, data: bytes, form: tuple[int, ...] = TENSOR) -> None:
        self.request(PUT, key, len(data), form)
        self.sock.sendall(data)

    def reply(self) -> tuple[int, ...]:
        return struct.unpack("iiiiiiiii", self.take(36))

    def get(self, key: str) -> tuple[tuple[int, ...], bytes]:
        self.request(GET, key)
        head = self.reply()
        return head, self.take(head[1])

    def exists(self, key: str) -> bool:
        self.request(EXIST, key)
        code, *rest = self.reply()
        assert rest == [0, 1, 2, 0, 0, 0, 0, 0]
        return code == 200

    def healthy(self) -> bool:
        self.request(HEALTH)
        return self.reply() == (200, 0, 1, 2, 0, 0, 0, 0, 0)

    def take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            if not part:
                raise ConnectionResetError("the server hung up")
            data += part
        return data

    def is_hung_up_on(self) -> bool:
        """Whether the server ends the connection without another byte."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
