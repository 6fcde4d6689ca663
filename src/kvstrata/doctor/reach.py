"""What the configuration points to: tiers, and the address of the HTTP API."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kvstrata.config import Settings, TierConfig, unbounded
from kvstrata.doctor.finding import Finding, Level
from kvstrata.errors import ConfigError, PluginError, TierError
from kvstrata.logs import LOGGER_NAME
from kvstrata.tiers.base import PROBE_KEY, Tier
from kvstrata.tiers.open import open_tier

_SLOW_SECONDS = 0.02
_ENCRYPTED = frozenset({"rediss", "rediss-sentinel", "rediss-cluster", "valkeys", "lms", "https", "s3"})


def check_http(settings: Settings) -> Finding:
    """Whether the HTTP API may listen where it is told to."""
    try:
        from kvstrata.http.access import make_access  # noqa: PLC0415  the extra "http" may be missing
    except ImportError:
        return Finding(
            "HTTP API", Level.NOTE, "its libraries are not installed", "pip install 'kvstrata[http]'"
        )
    try:
        access = make_access(
            settings.http_host, settings.http_token_file, open_reads=settings.http_open_reads
        )
    except ConfigError as error:
        return Finding("HTTP API", Level.ERROR, str(error), "without that the server does not start")
    token = "with a token" if access.token else "without a token, for this machine only"
    return Finding("HTTP API", Level.OK, f"on {settings.http_host}, {token}")


def check_tier(config: TierConfig) -> Iterator[Finding]:
    """Whether a tier answers, how fast, and what it says of itself. Nothing is written to it."""
    check = f"tier {config.name}"
    path = config.options.get("path")
    if path is not None:
        yield from _check_directory(check, Path(path), config.options.get("max_bytes"))
        if not Path(path).is_dir():
            return
    url = config.options.get("url")
    if isinstance(url, str):
        yield from _check_transport(check, url)
    with _heard() as said:
        try:
            tier = open_tier(unbounded(config))
        except (ConfigError, PluginError) as error:
            yield Finding(
                check, Level.ERROR, str(error), "correct the tier's settings, or install what is missing"
            )
            return
        with contextlib.closing(tier):
            yield _check_answer(check, tier)
    for record in said:
        yield Finding(check, Level.WARNING, record.getMessage(), "see there")


def _check_answer(check: str, tier: Tier) -> Finding:
    try:
        tier.contains([PROBE_KEY])
        started = time.monotonic()
        tier.contains([PROBE_KEY])
        seconds = time.monotonic() - started
    except TierError as error:
        return Finding(
            check,
            Level.ERROR,
            f"{tier.describe()}: {error}",
            "start it, or correct address, password and firewall",
        )
    text = f"{tier.describe()} answers in {1000 * seconds:.1f} ms"
    if seconds > _SLOW_SECONDS:
        return Finding(
            check, Level.WARNING, text, "every look-up that L1 cannot answer waits for it; move it nearer"
        )
    return Finding(check, Level.OK, text)


def _check_transport(check: str, url: str) -> Iterator[Finding]:
    parts = urlsplit(url)
    if parts.scheme in _ENCRYPTED or not parts.hostname:
        return
    try:
        found = socket.getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return  # that it cannot be reached is another finding
    if not all(ipaddress.ip_address(each[4][0]).is_loopback for each in found):
        yield Finding(
            check,
            Level.NOTE,
            f"{parts.scheme}:// is not encrypted: who can read the network can read the KV of prompts",
            "use TLS (rediss://, lms://) unless the network is private",
        )


def _check_directory(check: str, directory: Path, max_bytes: object) -> Iterator[Finding]:
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding(
            check, Level.ERROR, f"{existing} cannot be written to", "chown it, or choose another directory"
        )
        return
    space = os.statvfs(existing)
    free, wanted = space.f_bavail * space.f_frsize, max_bytes if isinstance(max_bytes, int) else 0
    text = f"{existing} has {free / 2**30:.1f} GiB free, the budget is {wanted / 2**30:.1f} GiB"
    if free < wanted:
        yield Finding(
            check,
            Level.WARNING,
            text,
            "lower the budget; when the disk is full the tier goes on without storing",
        )
    else:
        yield Finding(check, Level.OK, text)


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def _heard() -> Iterator[list[logging.LogRecord]]:
    """The warnings that kvstrata logs meanwhile; a tier says there what its server lacks."""
    logger, handler = logging.getLogger(LOGGER_NAME), _Records()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield handler.records
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
