"""A KV cache layer for LLM inference: a shared prompt prefix is computed once, then loaded.

    import kvstrata

    with kvstrata.LocalClient(kvstrata.Settings(max_local_cpu_size=1.0)) as cache:
        ...

``LocalClient`` holds a cache in this process, ``connect`` reaches a server; both are a ``Client``. What they store
is described by a ``Namespace`` and a ``KVLayout``, and found again by the hashes of ``PrefixHasher``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvstrata.__about__ import __version__

if TYPE_CHECKING:
    from kvstrata.client import Client, LocalClient, RemoteClient, Reservation, connect
    from kvstrata.config import Settings, load_settings
    from kvstrata.errors import KVStrataError
    from kvstrata.hashing import PrefixHasher, full_chunks, tail_pieces
    from kvstrata.types import Hit, KVLayout, Namespace, Piece, Prefix

__all__ = [
    "Client",
    "Hit",
    "KVLayout",
    "KVStrataError",
    "LocalClient",
    "Namespace",
    "Piece",
    "Prefix",
    "PrefixHasher",
    "RemoteClient",
    "Reservation",
    "Settings",
    "__version__",
    "connect",
    "full_chunks",
    "load_settings",
    "tail_pieces",
]

_HOMES = {
    "kvstrata.client": ("Client", "LocalClient", "RemoteClient", "Reservation", "connect"),
    "kvstrata.config": ("Settings", "load_settings"),
    "kvstrata.errors": ("KVStrataError",),
    "kvstrata.hashing": ("PrefixHasher", "full_chunks", "tail_pieces"),
    "kvstrata.types": ("Hit", "KVLayout", "Namespace", "Piece", "Prefix"),
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: the modules below import this one for its version."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'kvstrata' has no attribute {name!r}")
