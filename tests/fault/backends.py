"""The backends of the fault suite."""

from __future__ import annotations

from backend_base import Backend
from directories import Disk
from redis_family import PlainRedis, TLSRedis, UnixRedis
from stores import S3

BACKENDS: dict[str, type[Backend]] = {made.name: made for made in (PlainRedis, UnixRedis, TLSRedis, Disk, S3)}
"""All of them, by name."""
