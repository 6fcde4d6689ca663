"""``kvstrata remote``: a small network store that inference engines on several hosts share."""

from __future__ import annotations

import os
from typing import Annotated, Any

import msgspec
import typer

from kvstrata import plugins
from kvstrata.config import GIB
from kvstrata.errors import ConfigError
from kvstrata.logs import configure_logging

EXAMPLE = "Example: kvstrata remote 0.0.0.0 65432 --max-size-gb 20 --token-file /etc/kvstrata/token"

_MIB = 1 << 20
_MAX_FRAME_MIB = 2047
_MAX_GIB = 1 << 20


def _option(flag: str, metavar: str, text: str, **more: Any) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, **more)


Host = Annotated[str, typer.Argument(metavar="HOST", help="Address to listen on.")]
Port = Annotated[int, typer.Argument(metavar="PORT", min=0, max=65535, help="0: any that is free.")]
Device = Annotated[
    str, typer.Argument(metavar="cpu", help="As in LMCache's command; only 'cpu', host memory.")
]
MaxSize = Annotated[float, _option("--max-size-gb", "GIB", "Memory for entries.")]
Policy = Annotated[str, _option("--eviction-policy", "NAME", "Which entry goes first.")]
Ttl = Annotated[int | None, _option("--ttl-seconds", "SECONDS", "The longest that an entry lives.", min=1)]
Disk = Annotated[
    str | None, _option("--disk", "DIR", "Keep entries there too, so that they survive a restart.")
]
MaxDiskSize = Annotated[float, _option("--max-disk-size-gb", "GIB", "Budget of --disk.")]
TokenFile = Annotated[str | None, _option("--token-file", "FILE", "Holds what clients must prove to know.")]
TlsCert = Annotated[str | None, _option("--tls-cert", "FILE", "Certificate chain: serve lms://.")]
TlsKey = Annotated[str | None, _option("--tls-key", "FILE", "Its key, if it is in another file.")]
MaxFrame = Annotated[
    int, _option("--max-frame-mb", "MIB", "Larger entries are refused.", min=1, max=_MAX_FRAME_MIB)
]
LogLevel = Annotated[str | None, _option("--log-level", "LEVEL", "DEBUG, INFO, WARNING or ERROR.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the process id and the URL as one line of JSON.")]


def remote(
    host: Host,
    port: Port,
    device: Device = "cpu",
    *,
    max_size_gb: MaxSize = 5.0,
    eviction_policy: Policy = "LRU",
    ttl_seconds: Ttl = None,
    disk: Disk = None,
    max_disk_size_gb: MaxDiskSize = 50.0,
    token_file: TokenFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    max_frame_mb: MaxFrame = 256,
    log_level: LogLevel = None,
    as_json: AsJson = False,
) -> int:
    """Run a remote store for lm:// until SIGTERM or SIGINT.

    kvstrata and LMCache use it with remote_url lm://HOST:PORT. It keeps entries in memory within a budget, and on
    disk if that is asked for. When it ends, what is in flight is completed first.
    """
    # Here, because no other command needs them.
    from kvstrata.remote.lifecycle import run  # noqa: PLC0415
    from kvstrata.remote.service import RemoteOptions  # noqa: PLC0415
    from kvstrata.tiers.lm.endpoint import read_token  # noqa: PLC0415

    if device != "cpu":
        raise typer.BadParameter(f"device {device!r} is not possible; entries are kept in host memory: cpu")
    policies = plugins.names("policies")
    if eviction_policy.lower() not in policies:
        raise typer.BadParameter(f"--eviction-policy {eviction_policy!r}: there is {', '.join(policies)}")
    configure_logging(log_level)
    options = RemoteOptions(
        host=host,
        port=port,
        max_bytes=_bytes("--max-size-gb", max_size_gb),
        policy=eviction_policy.lower(),
        ttl_seconds=ttl_seconds,
        disk=disk,
        max_disk_bytes=_bytes("--max-disk-size-gb", max_disk_size_gb),
        token=read_token(token_file) if token_file else b"",
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_frame_bytes=max_frame_mb * _MIB,
    )
    return run(options, _announce if as_json else None)


def _bytes(flag: str, gibibytes: float) -> int:
    if not 0 < gibibytes <= _MAX_GIB:
        raise ConfigError(f"{flag} {gibibytes:g} is not allowed: expected more than 0 and up to {_MAX_GIB}")
    return int(gibibytes * GIB)


def _announce(server: Any) -> None:
    """Whoever started the server reads this while it runs."""
    print(msgspec.json.encode({"pid": os.getpid(), "url": server.url}).decode(), flush=True)
