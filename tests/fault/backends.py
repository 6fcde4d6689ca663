"""The backends of the fault suite."""

from __future__ import annotations

from backend_base import Backend
from directories import Disk
from redis_family import PlainRedis, RedisRing, TLSRedis, UnixRedis
from stores import S3, Mooncake

BACKENDS: dict[str, type[Backend]] = {
    made.name: made for made in (PlainRedis, UnixRedis, TLSRedis, RedisRing, Disk, S3, Mooncake)
}
"""All of them, by name."""
