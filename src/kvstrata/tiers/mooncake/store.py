"""One connection to a Mooncake cluster, made by the first operation that needs it."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.arena import Arena
from kvstrata.tiers.mooncake import library
from kvstrata.tiers.mooncake.options import Master, MooncakeOptions

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LIBRARY_BUFFER_BYTES = 1 << 20
"""For operations that copy, of which none is used."""


class Store:
    """The library's store with lazy set-up, and with its error codes as exceptions. Thread-safe.

    The library takes 4 seconds and more to notice that a master is gone, whatever its deadlines say. So an idle
    connection of our own tells before each operation whether the master has hung up; where it has, and after a
    failure, the master's port is tried first, with a deadline of our own.
    """

    def __init__(self, master: Master, options: MooncakeOptions) -> None:
        self._master = master
        self._options = options
        self._lock = threading.Lock()
        self._store: Any = None
        self._gives_memory = False
        self._is_suspect = True
        self._line: socket.socket | None = None
        """To the master's port; nothing goes over it."""
        self._is_closed = False
        self._library = library.load()
        self.arena = Arena(options.local_buffer_size, "local_buffer_size")
        self._replicas = self._library.ReplicateConfig()
        self._replicas.replica_num = options.replica_num

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Which objects there are; one question to the master."""
        codes = self._call(lambda store: store.batch_is_exist(list(keys)))
        self._check("look-up", [code for code in codes if code < 0])
        return [code == 1 for code in codes]

    def get_into(self, keys: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Read objects to these addresses of the arena. The size of each, or one of its error codes.

        Raises:
            TierUnavailable: the master does not answer, or no object of the batch could be transferred.
        """
        codes: list[int] = self._call(
            lambda store: store.batch_get_into(list(keys), list(addresses), list(sizes))
        )
        failed = [code for code in codes if code < 0 and code not in library.PER_OBJECT]
        self._check("read", failed if len(failed) == len(codes) else [])
        return codes

    def size(self, key: str) -> int:
        """The size of an object; 0 when it is not there."""
        size: int = self._call(lambda store: store.get_size(key))
        self._check("look-up", [size] if size in library.UNREACHABLE else [])
        return max(0, size)

    def put_from(self, key: str, address: int, size: int) -> None:
        """Store an object from this address of the arena, in place of what was there.

        Raises:
            TierFull: no node has room, and nothing can be evicted now.
        """
        self._give_memory()
        code = self._call(lambda store: store.upsert_from(key, address, size, self._replicas))
        if code == library.NO_ROOM:
            raise TierFull(f"Mooncake at {self._master.address} has no room: {library.code_name(code)}")
        if code != library.NOT_FOUND:  # deleted by another client while it was written
            self._check("write", [code] if code else [])

    def remove(self, keys: Sequence[str]) -> int:
        """Drop objects, leases or not; how many there were."""
        codes = self._call(lambda store: store.batch_remove(list(keys), force=True))
        absent = {0, library.NOT_FOUND, library.NOT_READY}
        self._check("delete", [code for code in codes if code not in absent])
        return sum(code == 0 for code in codes)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            store, self._store = self._store, None
        self._keep_line(None)
        if store is not None:
            store.close()

    def _call(self, operation: Callable[[Any], T]) -> T:
        return operation(self._ready())

    def _ready(self) -> Any:
        """The library's store, unless the master is known to be gone."""
        if self._is_suspect or self._has_hung_up():
            self._try_master()
        return self._open()

    def _has_hung_up(self) -> bool:
        """Whether the master's end of our connection is gone. Costs microseconds. A lost host does not tell."""
        with self._lock:
            if self._line is None:
                return True
            poll = select.poll()
            poll.register(self._line, select.POLLIN)
            return bool(poll.poll(0))

    def _check(self, what: str, codes: Sequence[int]) -> None:
        """Raise for error codes; without any, the master is trusted again."""
        self._is_suspect = any(code in library.UNREACHABLE for code in codes)
        if codes:
            raise TierUnavailable(
                f"Mooncake at {self._master.address}: {what} failed: {library.code_name(codes[0])}"
            )

    def _try_master(self) -> None:
        timeout = self._options.timeout_seconds / 2
        try:
            line = socket.create_connection((self._master.host, self._master.port), timeout)
        except OSError as error:
            raise TierUnavailable(f"no Mooncake master at {self._master.address}: {error}") from error
        self._keep_line(line)

    def _keep_line(self, line: socket.socket | None) -> None:
        with self._lock:
            before, self._line = self._line, line
            if self._is_closed and line is not None:
                before, self._line = line, None
        if before is not None:
            before.close()

    def _open(self) -> Any:
        with self._lock:
            if self._is_closed:
                raise TierUnavailable("the mooncakestore tier is closed")
            if self._store is None:
                self._store = self._set_up()
            return self._store

    def _set_up(self) -> Any:
        options, store = self._options, self._library.MooncakeDistributedStore()
        library.set_environment(options.timeout_seconds)
        # Without memory for the cluster: whoever only reads or lists must not be given others' objects to keep.
        code = store.setup(
            options.local_hostname or self._own_address(),
            options.metadata_server,
            0,
            _LIBRARY_BUFFER_BYTES,
            options.protocol,
            options.device_name,
            self._master.address,
        )
        if code != 0:
            store.close()
            raise TierUnavailable(
                f"cannot set up Mooncake with master {self._master.address}, metadata server"
                f" {options.metadata_server}, protocol {options.protocol}: {library.code_name(code)}"
            )
        self._register(store)
        return store

    def _register(self, store: Any) -> None:
        code = store.register_buffer(self.arena.address, self.arena.size_bytes)
        if code != 0:
            store.close()
            raise TierUnavailable(
                f"Mooncake cannot register {self.arena.size_bytes} bytes: {library.code_name(code)};"
                " see local_buffer_size (RDMA wants a sufficient ulimit -l)"
            )

    def _give_memory(self) -> None:
        """Before the first write: the memory that this process gives to the cluster."""
        size = self._options.global_segment_size
        if self._gives_memory or not size:
            return
        store = self._ready()
        with self._lock:
            if self._gives_memory:
                return
            result = store.allocate_and_mount_segment(size, self._options.protocol)
            if result["ret"] != 0:
                self._is_suspect = True
                raise TierUnavailable(
                    f"cannot give {size} bytes to Mooncake at {self._master.address}:"
                    f" {library.code_name(result['ret'])}; see global_segment_size"
                )
            self._gives_memory = True
        logger.info("gives %.2f GiB to Mooncake at %s", size / (1 << 30), self._master.address)

    def _own_address(self) -> str:
        """The address of this host that packets to the master leave from; sends none."""
        family, kind, _, _, address = socket.getaddrinfo(
            self._master.host, self._master.port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
