"""A real Mooncake master for tests: a child on loopback that ends with its parent.

It stores nothing itself: clients give it memory (``global_segment_size``), as :class:`MooncakeNode` does.
"""

from __future__ import annotations

import http.client
import importlib.util
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstrata.testing.process import ServerProcess, free_port

_NODE = """
import os, signal, sys
os.environ["MC_LOG_LEVEL"] = "ERROR"
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", sys.argv[1]) == 0
assert store.allocate_and_mount_segment(int(sys.argv[2]))["ret"] == 0
print("ready", flush=True)
signal.pause()
"""


class MooncakeMaster:
    """``mooncake_master`` of the installed package, on free ports. A context manager; not thread-safe."""

    def __init__(self) -> None:
        self.port = free_port()
        self.http_port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="kvs-mooncake-"))
        package = importlib.util.find_spec("mooncake")
        assert package is not None, "the package mooncake is not installed"
        assert package.origin is not None
        self._process = ServerProcess(
            "mooncake_master",
            [
                str(Path(package.origin).parent / "mooncake_master"),
                "--rpc_address=127.0.0.1",
                f"--rpc_port={self.port}",
                "--metrics_host=127.0.0.1",
                f"--metrics_port={self.http_port}",
            ],
            log_path=self._directory / "log",
            ready=self._answers,
            grace_seconds=0.1,
        )

    @property
    def url(self) -> str:
        """For a tier that gives 256 MiB to the cluster with its first write."""
        return (
            f"mooncakestore://127.0.0.1:{self.port}?master_http_port={self.http_port}"
            f"&global_segment_size={256 << 20}"
        )

    @property
    def address(self) -> str:
        """``host:port``, for clients of the library."""
        return f"127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=1)
        try:
            connection.request("GET", "/get_all_keys")
            ready = connection.getresponse().status == http.HTTPStatus.OK
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return ready

    def start(self) -> None:
        """Start it, or start it anew: it comes back on its ports, and knows nothing of what was stored."""
        self._process.start()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.stop()

    def signal(self, number: int) -> None:
        """Send a signal to it (SIGSTOP, SIGCONT)."""
        self._process.kill(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop it and delete its directory."""
        self._process.kill()
        self._process.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


class MooncakeNode:
    """Another process of the cluster, which gives it memory. A context manager."""

    def __init__(self, master: MooncakeMaster, num_bytes: int = 128 << 20) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kvs-mooncake-"))
        log = self._directory / "log"
        self._process = ServerProcess(
            "mooncake node",
            [sys.executable, "-c", _NODE, master.address, str(num_bytes)],
            log_path=log,
            ready=lambda: "ready" in log.read_text(),
            grace_seconds=0.1,
        )

    def signal(self, number: int) -> None:
        """Send a signal to it (SIGSTOP, SIGCONT, SIGKILL)."""
        self._process.kill(number)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.stop()
        shutil.rmtree(self._directory, ignore_errors=True)
