"""What a server says of itself, once, in the log: version, memory, how it makes room, how fast it answers."""

from __future__ import annotations

import logging
import time

from kvstrata.tiers.redis.resp import Connection, ErrorReply, Reply, command

log = logging.getLogger(__name__)


def introduce(connection: Connection, name: str, *, ttl_is_set: bool) -> None:
    """Log what the server is, with a warning when nothing there or here removes old entries.

    Raises:
        TierUnavailable: the connection broke.
    """
    started = time.monotonic()
    connection.send([command(b"INFO", b"server"), command(b"INFO", b"memory")])
    replies = [connection.reply(), connection.reply()]
    milliseconds = (time.monotonic() - started) * 500
    refused = next((reply for reply in replies if isinstance(reply, ErrorReply)), None)
    if refused is not None:
        log.info("%s: connected; INFO is refused (%s)", name, refused.code)
        return
    found = {**info_lines(replies[0]), **info_lines(replies[1])}
    kind = "Valkey" if "valkey_version" in found else "Redis"
    version = found.get("valkey_version") or found.get("redis_version", "of unknown version")
    policy = found.get("maxmemory_policy", "unknown")
    maxmemory = found.get("maxmemory", "unknown")
    budget = "not set" if maxmemory == "0" else f"{maxmemory} bytes"
    log.info(
        "%s: %s %s, maxmemory %s, maxmemory-policy %s, answers in %.1f ms",
        name,
        kind,
        version,
        budget,
        policy,
        milliseconds,
    )
    if not ttl_is_set and (maxmemory == "0" or not policy.startswith("allkeys-")):
        log.warning(
            "%s: nothing removes old entries (maxmemory %s, maxmemory-policy %s, no ttl_seconds). Set for"
            " example `maxmemory 80gb` and `maxmemory-policy allkeys-lru` there, or ttl_seconds here",
            name,
            budget,
            policy,
        )


def info_lines(reply: Reply) -> dict[str, str]:
    """The fields of an INFO reply; none when it is something else."""
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
