"""Clients of the cache: :func:`connect` for a server, ``LocalClient`` for a core in this process."""

from __future__ import annotations

import logging

from kvstrata.client.base import Client, Reservation
from kvstrata.client.embedded import EmbeddedServer
from kvstrata.client.local import LocalClient
from kvstrata.client.remote import RemoteClient
from kvstrata.config import Settings

__all__ = ["Client", "LocalClient", "RemoteClient", "Reservation", "connect"]

logger = logging.getLogger(__name__)

_START_SECONDS = 15.0


def connect(
    settings: Settings, *, name: str = "client", engine_id: str = "", map_pool: bool = True
) -> RemoteClient:
    """A client of the server at ``settings.server_url``, or of a private one that is started (embedded mode).

    Never raises because the server is absent; it is used as soon as it is there.

    Args:
        settings: the settings; embedded mode passes them on to the private server.
        name: who we are, for the server's log.
        engine_id: in embedded mode, what the clients have in common that share one private server.
        map_pool: whether this client copies payloads.
    """
    timeout_seconds = settings.rpc_timeout_ms / 1000
    if settings.server_url is not None:
        client = RemoteClient(settings.server_url, name, timeout_seconds=timeout_seconds, map_pool=map_pool)
        client.wait_connected(timeout_seconds)
        return client
    embedded = EmbeddedServer(settings, settings.runtime_directory, engine_id or name)
    client = RemoteClient(
        embedded.endpoint,
        name,
        timeout_seconds=timeout_seconds,
        map_pool=map_pool,
        keep_alive=embedded.keep_alive,
        on_close=embedded.close,
    )
    client.wait_connected(_START_SECONDS, unless=lambda: embedded.failure is not None)
    if not client.connected and (failure := embedded.failure) is not None:
        logger.error("%s: there is no cache, its server cannot start: %s", name, failure)
    return client
