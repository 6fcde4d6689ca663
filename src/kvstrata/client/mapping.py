"""A client's share in server pools: the connection that proves that it lives, and the mapped memory."""

from __future__ import annotations

import logging
import os

from kvstrata.errors import PoolError
from kvstrata.memory.handover import PoolHandle, fetch_pool
from kvstrata.memory.region import SharedRegion

logger = logging.getLogger(__name__)


class PoolMapping:
    """One pool: its connection, and its memory if this client copies payloads."""

    def __init__(self, handle: PoolHandle, *, map_pool: bool) -> None:
        """Map what was handed over.

        Raises:
            PoolError: it cannot be mapped.
        """
        self.pool_id = handle.pool_id
        self._connection = handle.connection
        self._region: SharedRegion | None = None
        if not map_pool:
            os.close(handle.fd)
            return
        try:
            self._region = SharedRegion.attach(handle.fd, handle.size_bytes)
        except PoolError:
            self._connection.close()
            raise
        self._region.populate()

    @property
    def view(self) -> memoryview | None:
        return None if self._region is None else self._region.view

    def close(self) -> None:
        """Unmap, then let the server know."""
        if self._region is not None:
            self._region.close()
        self._connection.close()


class PoolMappings:
    """The pool of the present server, and the one before it.

    A load that was promised by a server which died meanwhile is still served right from the old mapping:
    nobody can reuse its slots any more.
    """

    def __init__(self, *, map_pool: bool) -> None:
        self._map_pool = map_pool
        self._mappings: list[PoolMapping] = []

    def add(self, pool_socket: str, pool_id: str, session: str, timeout_seconds: float) -> bool:
        """Take part in the pool behind ``pool_socket``; whether that is possible from here."""
        if any(mapping.pool_id == pool_id for mapping in self._mappings):
            return True
        try:
            handle = fetch_pool(pool_socket, session, timeout_seconds)
            if handle.pool_id != pool_id:
                handle.connection.close()
                os.close(handle.fd)
                raise PoolError(f"the pool at {pool_socket} is not this server's")
            self._mappings.append(PoolMapping(handle, map_pool=self._map_pool))
        except PoolError as error:
            logger.info("%s", error)
            return False
        while len(self._mappings) > 2:
            self._mappings.pop(0).close()
        return True

    def get(self, pool_id: str) -> memoryview | None:
        """The mapped memory of a pool; None when it is not mapped here."""
        for mapping in self._mappings:
            if mapping.pool_id == pool_id:
                return mapping.view
        return None

    def close(self) -> None:
        while self._mappings:
            self._mappings.pop().close()
