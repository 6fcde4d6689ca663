"""The backends of the fault suite."""

from __future__ import annotations

from backend_base import Backend
from directories import Disk, Nixl, SharedDirectory
from redis_family import ClusterRedis, PlainRedis, RedisRing, SentinelRedis, TLSRedis, UnixRedis
from stores import S3, InfiniStore, LMCacheStore, Mooncake, RemoteStore, TLSRemoteStore

BACKENDS: dict[str, type[Backend]] = {
    made.name: made
    for made in (
        PlainRedis,
        UnixRedis,
        TLSRedis,
        RedisRing,
        SentinelRedis,
        ClusterRedis,
        Disk,
        SharedDirectory,
        Nixl,
        S3,
        RemoteStore,
        TLSRemoteStore,
        LMCacheStore,
        Mooncake,
        InfiniStore,
    )
}
"""All of them, by name."""
