"""Settings of the Mooncake tier, also from its URL."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers.base import TierOptions
from kvstrata.tiers.urls import unknown_parameter

_SHORT = {"device": "device_name"}
"""Names in a URL's query that differ from the option's (LMCache writes ``?device=mlx5_0``)."""


class MooncakeOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the Mooncake tier; names as in LMCache and in Mooncake's own configuration.

    ``timeout_seconds`` is handed to the library, which reads it once per process.
    """

    url: str
    """``mooncakestore://host:port`` of the master; these settings may follow as a query (``?protocol=rdma``)."""
    local_hostname: str = ""
    """How other nodes reach this one; by default the address from which the master is reached."""
    metadata_server: str = "P2PHANDSHAKE"
    """Where transfer engines find each other: ``P2PHANDSHAKE``, or the URL of a metadata server."""
    protocol: str = "tcp"
    """``tcp`` or ``rdma`` (what else the installed build of Mooncake has)."""
    device_name: str = ""
    """RDMA devices, separated by commas; empty: found by Mooncake."""
    global_segment_size: int = 3_355_443_200
    """Bytes of memory that this process gives to the cluster, from its first write until it ends; 0 gives none,
    then other nodes must."""
    local_buffer_size: int = 512 << 20
    """Bytes of the buffer through which frames are read and written; at least the largest batch (16 MiB, or one
    frame) per worker. Takes memory as it is used; all at once with RDMA."""
    replica_num: int = 1
    """Copies of each frame, on different nodes."""
    master_http_port: int = 9003
    """The master's ``--metrics_port``, which lists keys and sizes; ``kvstrata keys`` and statistics want it."""


class Master(msgspec.Struct, frozen=True):
    """Where the master listens."""

    host: str
    port: int

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def read_url(options: MooncakeOptions) -> tuple[Master, MooncakeOptions]:
    """The master's address, and the settings with what the URL's query sets.

    Raises:
        ConfigError: the URL has another form, or a setting in it is unknown or wrong.
    """
    try:
        parts = urlsplit(options.url)
        host, port = parts.hostname, parts.port
        query = parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        host, port, query = None, None, []
    if not host or not port or parts.path.strip("/"):
        raise ConfigError("url of the mooncakestore tier: expected mooncakestore://HOST:PORT of the master")
    known = [*_SHORT, *(name for name in MooncakeOptions.__struct_fields__ if name != "url")]
    values = msgspec.structs.asdict(options)
    for name, value in query:
        if name not in known:
            raise unknown_parameter("mooncakestore", name, known)
        values[_SHORT.get(name, name)] = value
    try:
        options = msgspec.convert(values, MooncakeOptions, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"url of the mooncakestore tier: {error}") from None
    _check(options)
    return Master(host, port), options


def _check(options: MooncakeOptions) -> None:
    for name, least in (("global_segment_size", 0), ("local_buffer_size", 1 << 20), ("replica_num", 1)):
        value = getattr(options, name)
        if value < least:
            raise ConfigError(f"{name} of the mooncakestore tier is {value}; it must be at least {least}")
