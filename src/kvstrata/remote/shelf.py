"""The entries of a remote server on disk: the disk tier, used from an event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from kvstrata.errors import TierError
from kvstrata.remote.envelope import ENVELOPE_BYTES, Envelope, disk_key, original_key
from kvstrata.remote.store import Entry, Store
from kvstrata.tiers.disk import DiskTier
from kvstrata.tiers.lm import wire
from kvstrata.types import Miss

log = logging.getLogger(__name__)

_READ_THREADS = 2


class Shelf:
    """What is written is saved in the background by one thread, in order; what is not in memory is read back.

    When the disk cannot keep up, entries stay in memory only, and are counted. Used on the event loop's thread.
    """

    def __init__(self, disk: DiskTier, store: Store, queue_bytes: int) -> None:
        self._disk = disk
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._queue_bytes = queue_bytes
        self._queued_bytes = 0
        self._queued: set[Future[None]] = set()
        self._loading: dict[bytes, int] = {}
        self._stale: set[bytes] = set()
        """Of those that are being loaded: deleted or replaced meanwhile."""
        self._writer = ThreadPoolExecutor(1, "kvstrata-remote-save")
        self._readers = ThreadPoolExecutor(_READ_THREADS, "kvstrata-remote-load")
        self.num_dropped = 0
        self.num_failed = 0

    def save(self, entry: Entry, *, wait_in_line: bool = False) -> None:
        """Write ``entry`` in the background; its memory is pinned until then."""
        if entry.key in self._loading:
            self._stale.add(entry.key)
        if self._queued_bytes + entry.size > self._queue_bytes and not wait_in_line:
            self.num_dropped += 1
            self._submit(partial(self._disk.delete, [disk_key(entry.key)]))  # an older value is stale now
            return
        self._store.pin(entry)
        self._queued_bytes += entry.size
        entry.saved = True
        data = self._store.enveloped(entry)
        written = self._submit(partial(self._write, entry.key, entry, data))
        written.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._saved, entry))

    def _submit(self, job: Callable[[], object]) -> Future[None]:
        future = self._writer.submit(self._run, job)
        self._queued.add(future)
        future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._queued.discard, done))
        return future

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except TierError as error:
            self.num_failed += 1
            if self.num_failed == 1:
                log.warning("the disk fails, entries stay in memory only: %s", error)

    def _write(self, key: bytes, entry: Entry, data: memoryview) -> None:
        checksum = entry.checksum or wire.checksum(key, data[ENVELOPE_BYTES:])
        Envelope(entry.form, checksum, entry.expires_at, entry.size).pack_into(data, key)
        self._disk.write([disk_key(key)], [data])

    def _saved(self, entry: Entry) -> None:
        self._queued_bytes -= entry.size
        self._store.unpin(entry)

    def contains(self, key: bytes) -> bool:
        """Whether there is a file for ``key``, as far as the index in memory knows."""
        return self._disk.size(disk_key(key)) is not None

    def size(self, key: bytes) -> int | None:
        """Bytes of the value, if there is a file for ``key``."""
        size = self._disk.size(disk_key(key))
        return None if size is None else max(0, size - ENVELOPE_BYTES)

    def held_keys(self) -> list[bytes]:
        """The keys of all files, without those that are named by a digest of their key."""
        return [key for name in self._disk.held_keys() if (key := original_key(name)) is not None]

    async def load(self, key: bytes, entry: Entry) -> bool:
        """Read ``key`` into ``entry``, which has been reserved for it; False when there is no such file now."""
        data = self._store.enveloped(entry)
        self._loading[key] = self._loading.get(key, 0) + 1
        # A client that goes away meanwhile does not free the slot that the thread is filling.
        self._store.pin(entry)
        reading = self._readers.submit(self._read, key, data)
        reading.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._store.unpin, entry))
        try:
            envelope = await asyncio.wrap_future(reading)
        finally:
            self._loading[key] -= 1
            stale = key in self._stale
            if not self._loading[key]:
                del self._loading[key]
                self._stale.discard(key)
        if envelope is None or stale:
            return False
        entry.form = envelope.form
        entry.checksum = envelope.checksum
        entry.expires_at = envelope.expires_at
        entry.saved = True
        return True

    def _read(self, key: bytes, data: memoryview) -> Envelope | None:
        name = disk_key(key)
        try:
            (result,) = self._disk.read([name], [data])
            if isinstance(result, Miss):
                return None
            envelope = Envelope.unpack(data[:result], key)
            if envelope is None or wire.checksum(key, data[ENVELOPE_BYTES:result]) != envelope.checksum:
                log.warning("the file of %s is damaged, it is deleted", name)
                self._disk.delete([name])
            elif envelope.expires_at <= time.time():
                self._disk.delete([name])
            elif result == len(data):  # else it has just been replaced
                return envelope
        except TierError as error:
            log.warning("the disk fails, %s is a miss: %s", name, error)
        return None

    async def delete(self, keys: list[bytes]) -> None:
        """Delete files, after what is queued."""
        self._stale.update(key for key in keys if key in self._loading)
        names = [disk_key(key) for key in keys]
        await asyncio.wrap_future(self._submit(partial(self._disk.delete, names)))
        self._stale.update(key for key in keys if key in self._loading)  # begun before the files were gone

    def discard(self, keys: list[bytes]) -> None:
        """Delete files in the background."""
        self._submit(partial(self._disk.delete, [disk_key(key) for key in keys]))

    async def flush(self, timeout_seconds: float) -> int:
        """Save what is in memory only and wait for the queue; return how many entries were not saved in time."""
        unsaved = [entry for entry in self._store.entries if not entry.saved]
        for entry in unsaved:
            self.save(entry, wait_in_line=True)
        waiting = [asyncio.wrap_future(future) for future in self._queued]
        if not waiting:
            return 0
        _, late = await asyncio.wait(waiting, timeout=timeout_seconds)
        for future in late:
            future.cancel()
        return len(late)

    def close(self) -> None:
        """End the threads; what is queued is given up, what is being written is completed."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._disk.close()
