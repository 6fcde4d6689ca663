"""The raw loops (:mod:`kvstrata.testing.raw`) of Mooncake, its library alone, and of InfiniStore, one socket."""

from __future__ import annotations

import ctypes
import mmap
import socket
from urllib.parse import urlsplit

from kvstrata.tiers.infinistore import protocol
from kvstrata.tiers.mooncake import MooncakeOptions, library
from kvstrata.tiers.mooncake.options import read_url
from kvstrata.tiers.sockets import SOCKET_BYTES

_BUFFER_BYTES = 128 << 20


class RawMooncake:
    """``upsert_from`` and ``get_into`` in registered memory: what the library does without a copy of ours.

    It gives no memory to the cluster: other nodes must.
    """

    def __init__(self, url: str) -> None:
        master, options = read_url(MooncakeOptions(url=url))
        library.set_environment(options.timeout_seconds)
        self._store = library.load().MooncakeDistributedStore()
        self._memory = mmap.mmap(-1, _BUFFER_BYTES)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._check(
            self._store.setup(
                options.local_hostname or "127.0.0.1",
                options.metadata_server,
                0,
                1 << 20,
                options.protocol,
                options.device_name,
                master.address,
            )
        )
        self._check(self._store.register_buffer(self._address, _BUFFER_BYTES))

    def _check(self, code: int) -> None:
        if code < 0:
            raise OSError(f"Mooncake's library answers {library.code_name(code)}")

    def write(self, number: int, frame: memoryview) -> None:
        self._check(self._store.upsert_from(f"raw{number}", self._address, len(frame)))

    def read(self, number: int, frame: memoryview) -> None:
        self._check(self._store.get_into(f"raw{number}", self._address, len(frame)))

    def close(self, num_frames: int) -> None:
        self._store.batch_remove([f"raw{number}" for number in range(num_frames)], force=True)
        self._store.close()


class RawInfiniStore:
    """Puts and gets over one socket."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port or 0), 30)
        self._socket.settimeout(None)  # with a timeout each value takes many system calls
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)

    def _word(self) -> int:
        word = bytearray(protocol.WORD.size)
        self._receive(memoryview(word))
        return int.from_bytes(word, "little", signed=True)

    def _receive(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            if not count:
                raise OSError("InfiniStore closed the connection")
            view = view[count:]

    def write(self, number: int, frame: memoryview) -> None:
        request = protocol.put_request(f"raw{number}", len(frame))
        sent = self._socket.sendmsg([request, frame]) - len(request)
        self._socket.sendall(frame[sent:])
        if self._word() != protocol.FINISH:
            raise OSError("InfiniStore refused a value of the raw loop")

    def read(self, number: int, frame: memoryview) -> None:
        self._socket.sendall(protocol.get_request(f"raw{number}"))
        if self._word() != protocol.FINISH or self._word() != len(frame):
            raise OSError("InfiniStore lost a value of the raw loop")
        self._receive(frame)

    def close(self, num_frames: int) -> None:
        self._socket.sendall(protocol.delete_request([f"raw{number}" for number in range(num_frames)]))
        self._word()
        self._socket.close()
