"""What the master tells over HTTP, on its metrics port: the keys, and how much is stored."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager

from kvstrata.errors import TierUnavailable
from kvstrata.types import TierStats

MAX_LINE_BYTES = 1 << 16


class MasterHTTP:
    """The HTTP side of one master. Holds nothing; every question is a connection."""

    def __init__(self, host: str, port: int, timeout_seconds: float) -> None:
        self._host = host
        self._port = port
        self._timeout_seconds = timeout_seconds

    def list_keys(self) -> Iterator[str]:
        """All keys of the cluster, of whatever client, in one answer that is read as it comes."""
        with self._get("/get_all_keys") as lines:
            for line in lines:
                yield line.decode("utf-8", "replace")

    def stats(self) -> TierStats:
        """Objects, bytes and capacity of the whole cluster."""
        found: dict[str, int] = {}
        with self._get("/metrics") as lines:
            for line in lines:
                name, _, value = line.partition(b" ")
                if name.startswith(b"master_") and value.isdigit():
                    found[name.decode()] = int(value)
        return TierStats(
            entries=found.get("master_key_count"),
            used_bytes=found.get("master_allocated_bytes"),
            budget_bytes=found.get("master_total_capacity_bytes") or None,
        )

    @contextmanager
    def _get(self, path: str) -> Iterator[Iterator[bytes]]:
        """The lines of an answer."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_seconds)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.OK:
                raise TierUnavailable(f"{self._name(path)} answers {answer.status}")
            yield iter(lambda: answer.readline(MAX_LINE_BYTES).rstrip(b"\r\n"), b"")
        except (OSError, http.client.HTTPException) as error:
            raise TierUnavailable(
                f"{self._name(path)} cannot be asked ({error}); it is the master's --metrics_port,"
                " master_http_port here"
            ) from error
        finally:
            connection.close()

    def _name(self, path: str) -> str:
        return f"Mooncake's master at http://{self._host}:{self._port}{path}"
