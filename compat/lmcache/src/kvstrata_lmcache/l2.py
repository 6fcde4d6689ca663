"""The L2 adapters of LMCache's server (``--l2-adapter JSON``), as tiers."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote

GIB = 1 << 30

_TUNING = frozenset(
    {
        "affinity_tag",
        "connection_timeout",
        "eviction",
        "num_workers",
        "persist_enabled",
        "read_ahead_size",
        "relative_tmp_dir",
        "request_timeout",
        "shared",
        "use_odirect",
    }
)
"""Keys that say how an adapter works, not what it stores and where: tiers have bounds of their own."""


def tier_of(adapter: Any) -> dict[str, Any]:
    """The item of ``tiers`` that an adapter's JSON stands for.

    Raises:
        ValueError: it is none that has a tier here, or a key of it has no counterpart.
    """
    kind = adapter.get("type") if isinstance(adapter, dict) else None
    if kind not in _ADAPTERS:
        raise ValueError(f"type {kind!r} has no counterpart ({', '.join(_ADAPTERS)} have); see 'tiers'")
    left = {name: value for name, value in adapter.items() if name not in _TUNING and name != "type"}
    tier = _ADAPTERS[kind](left)
    if left:
        raise ValueError(f"{kind}: {', '.join(sorted(left))} has no counterpart; see 'tiers'")
    return tier


def _resp(left: dict[str, Any]) -> dict[str, Any]:
    def value(name: str) -> str:
        return str(left.pop(name, "") or os.environ.get(f"LMCACHE_RESP_{name.upper()}", ""))

    host, port, login = value("host"), value("port"), _login(value("username"), value("password"))
    if not host or not port:
        raise ValueError("resp: host and port must be given")
    left.pop("max_capacity_gb", None)  # the server has its own maxmemory
    return {"url": f"redis://{login}{host}:{port}"}


def _valkey(left: dict[str, Any]) -> dict[str, Any]:
    nodes = left.pop("startup_nodes", "")
    if not nodes:
        raise ValueError("valkey: startup_nodes must be given")
    cluster = left.pop("cluster_mode", False)
    scheme = ("valkeys" if left.pop("tls_enable", False) else "valkey") + ("-cluster" if cluster else "")
    login = _login(left.pop("username", ""), left.pop("password", ""))
    database = left.pop("database_id", None)
    url = f"{scheme}://{login}{nodes if cluster else nodes.split(',')[0]}" + (
        f"/{database}" if database else ""
    )
    ttl_seconds = left.pop("ttl_seconds", None)
    left.pop("max_capacity_gb", None)
    return {"url": url} if ttl_seconds is None else {"url": url, "ttl_seconds": ttl_seconds}


def _directory(left: dict[str, Any]) -> dict[str, Any]:
    capacity_gb = left.pop("max_capacity_gb", 0)
    if not capacity_gb or not left.get("base_path"):
        raise ValueError("fs: base_path and max_capacity_gb must be given; a directory has a budget here")
    return {"kind": "file", "path": left.pop("base_path"), "max_bytes": int(capacity_gb * GIB)}


def _login(name: str, password: str) -> str:
    return f"{quote(name, safe='')}:{quote(password, safe='')}@" if name or password else ""


_ADAPTERS = {"resp": _resp, "valkey": _valkey, "fs": _directory, "fs_native": _directory}
