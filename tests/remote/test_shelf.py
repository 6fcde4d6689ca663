"""Persistence of a remote server: restarts, damage, time, a disk that is full or slow."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import pytest

from kvstrata.errors import ConfigError, TierFull
from kvstrata.policies.lru import LRUPolicy
from kvstrata.remote.envelope import ENVELOPE_BYTES, Envelope, disk_key, original_key
from kvstrata.remote.service import RemoteOptions, Service
from kvstrata.remote.shelf import Shelf
from kvstrata.remote.store import Store
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.testing.waiting import wait_until
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.lm import LmOptions, LmTier
from kvstrata.tiers.lm.wire import Form
from kvstrata.types import Miss


def files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.kv"))


def test_entries_survive_a_restart(tmp_path: Path) -> None:
    keys = make_keys(20)
    frames = [make_frame(100_000 + seed, seed) for seed in range(20)]
    with (
        RemoteServerThread(disk=str(tmp_path)) as server,
        contextlib.closing(LmTier(LmOptions(url=server.url, checksums=True))) as tier,
    ):
        tier.write(keys, frames)
        assert tier.delete(keys[:2]) == 2
        server.stop()
        assert len(files(tmp_path)) == 18
        server.start()
        assert tier.contains(keys) == [False] * 2 + [True] * 18
        assert sorted(tier.scan()) == sorted(keys[2:])
        results = read_frames(tier, keys)
        assert all(isinstance(result, Miss) for result in results[:2])
        assert results[2:] == [bytes(frame) for frame in frames[2:]]
        assert tier.delete(keys) == 18
        assert files(tmp_path) == []


def test_what_memory_has_no_room_for_comes_from_disk(tmp_path: Path) -> None:
    keys = make_keys(30)
    with (
        RemoteServerThread(disk=str(tmp_path), max_bytes=4 << 20) as server,
        contextlib.closing(LmTier(LmOptions(url=server.url))) as tier,
    ):
        for seed, key in enumerate(keys):
            tier.write([key], [make_frame(500_000, seed)])
            wait_until(lambda: not server.service.shelf._queued_bytes, "it is on disk")
        assert len(server.service.store) < 10
        assert tier.contains(keys) == [True] * 30
        for _ in range(2):
            assert read_frames(tier, keys) == [bytes(make_frame(500_000, seed)) for seed in range(30)]
        assert server.service.store.used_bytes <= 4 << 20


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "swap", "empty"])
def test_a_damaged_file_is_a_miss_and_is_deleted(tmp_path: Path, damage: str) -> None:
    first, second = make_keys(2)
    with (
        RemoteServerThread(disk=str(tmp_path)) as server,
        contextlib.closing(LmTier(LmOptions(url=server.url))) as tier,
    ):
        tier.write([first, second], [make_frame(5000, 1), make_frame(5000, 2)])
        server.stop()
        path = next(path for path in files(tmp_path) if path.stem in first)
        data = bytearray(path.read_bytes())
        match damage:
            case "flip":
                data[3000] ^= 1
            case "cut":
                del data[3000:]
            case "grow":
                data += b"more"
            case "swap":
                data[:] = next(path for path in files(tmp_path) if path.stem in second).read_bytes()
            case _:
                data.clear()
        path.write_bytes(data)
        server.start()
        results = read_frames(tier, [first, second])
        assert isinstance(results[0], Miss)
        assert results[1] == bytes(make_frame(5000, 2))
        assert tier.contains([first, second]) == [False, True]


def test_times_to_live_go_on_over_a_restart(tmp_path: Path) -> None:
    keys = make_keys(2)
    with RemoteServerThread(disk=str(tmp_path), ttl_seconds=1000) as server:
        with contextlib.closing(LmTier(LmOptions(url=server.url, ttl_seconds=1))) as tier:
            tier.write(keys[:1], [make_frame(100)])
        with contextlib.closing(LmTier(LmOptions(url=server.url, ttl_seconds=5000))) as tier:
            tier.write(keys[1:], [make_frame(100)])
        server.stop()
        time.sleep(1.1)
        server.start()
        with contextlib.closing(LmTier(LmOptions(url=server.url))) as tier:
            results = read_frames(tier, keys)
            assert isinstance(results[0], Miss)
            assert results[1] == bytes(make_frame(100))
            (entry,) = server.service.store.entries
            assert 900 < entry.expires_at - time.time() <= 1000


def test_what_expires_is_gone_from_memory_and_disk(tmp_path: Path) -> None:
    keys = make_keys(3)
    with (
        RemoteServerThread(disk=str(tmp_path), ttl_seconds=2) as server,
        contextlib.closing(LmTier(LmOptions(url=server.url))) as tier,
    ):
        tier.write(keys, [make_frame(100)] * 3)
        assert tier.contains(keys) == [True] * 3
        wait_until(lambda: not len(server.service.store) and not files(tmp_path), "all are gone")
        assert tier.contains(keys) == [False] * 3
        assert server.service.store.used_bytes == 0
        assert files(tmp_path) == []


class SlowDisk(DiskTier):
    """A disk that can be held up, or is full."""

    full = False

    def write(self, keys, frames):
        if self.full:
            raise TierFull("no room")
        time.sleep(0.02)
        super().write(keys, frames)


def put(store: Store, shelf: Shelf, key: bytes, size: int, fill: int) -> None:
    entry = store.reserve(key, size)
    store.value(entry)[:] = bytes([fill]) * size
    store.commit(entry)
    shelf.save(entry)
    store.unpin(entry)


@pytest.mark.parametrize("full", [False, True])
def test_a_disk_that_cannot_keep_up_is_left_out_and_an_older_value_does_not_stay(
    tmp_path: Path, full: bool
) -> None:
    async def run() -> None:
        store = Store(1 << 20, LRUPolicy())
        disk = SlowDisk(DiskOptions(path=str(tmp_path), max_bytes=1 << 30))
        shelf = Shelf(disk, store, queue_bytes=20_000)
        put(store, shelf, b"key", 10_000, 1)
        await asyncio.sleep(0.2)
        disk.full = full
        for _ in range(10):
            put(store, shelf, b"other", 10_000, 2)
        put(store, shelf, b"key", 10_000, 3)
        assert shelf.num_dropped > 0
        deadline = time.monotonic() + 5
        while shelf._queued and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert not shelf.contains(b"key")
        assert shelf._queued_bytes == 0
        disk.full = False
        assert await shelf.flush(10.0) == 0
        assert shelf.contains(b"key")
        shelf.close()
        store.close()

    asyncio.run(run())


def test_what_is_deleted_or_replaced_while_it_is_loaded_does_not_come_back(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(1 << 20, LRUPolicy())
        shelf = Shelf(DiskTier(DiskOptions(path=str(tmp_path), max_bytes=1 << 30)), store, 1 << 20)
        for replace in (False, True):
            put(store, shelf, b"key", 10_000, 1)
            await shelf.flush(5.0)
            store.delete(b"key")
            loading = store.reserve(b"key", 10_000)
            load = asyncio.create_task(shelf.load(b"key", loading))
            await asyncio.sleep(0)
            if replace:
                put(store, shelf, b"key", 10_000, 2)
            else:
                await shelf.delete([b"key"])
            assert not await load
            store.abort(loading)
        await shelf.flush(5.0)
        shelf.close()
        store.close()

    asyncio.run(run())


def test_what_is_read_from_disk_while_it_is_being_deleted_does_not_stay(tmp_path: Path) -> None:
    async def run() -> None:
        service = Service(RemoteOptions(host="", port=0, max_bytes=1 << 20, disk=str(tmp_path)))
        shelf = service.shelf
        assert shelf is not None
        put(service.store, shelf, b"key", 10_000, 1)
        await shelf.flush(5.0)
        service.store.delete(b"key")
        writer_is_free = threading.Event()
        shelf._submit(writer_is_free.wait)
        deleting = asyncio.create_task(service.delete([b"key"]))
        await asyncio.sleep(0)
        found = await service.find(b"key")  # it is still there
        assert found is not None
        service.store.unpin(found)
        writer_is_free.set()
        assert await deleting == 1
        assert not service.contains(b"key")
        service.close()

    asyncio.run(run())


def test_a_client_that_leaves_while_its_entry_is_loaded_frees_no_memory_in_use(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(1 << 20, LRUPolicy())
        shelf = Shelf(DiskTier(DiskOptions(path=str(tmp_path), max_bytes=1 << 30)), store, 1 << 20)
        put(store, shelf, b"key", 10_000, 1)
        await shelf.flush(5.0)
        store.delete(b"key")
        assert store.used_bytes == 0
        loading = store.reserve(b"key", 10_000)
        load = asyncio.create_task(shelf.load(b"key", loading))
        await asyncio.sleep(0)
        load.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await load
        store.abort(loading)
        deadline = time.monotonic() + 5
        while store.used_bytes and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert store.used_bytes == 0
        shelf.close()
        store.close()

    asyncio.run(run())


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        RemoteServerThread(disk=str(tmp_path / "file")).start()


def test_envelopes_and_names() -> None:
    (ours,) = make_keys(1)
    assert disk_key(ours.encode()) == ours
    assert original_key(ours) == ours.encode()
    for other in (b"m@1@0@abc@half", b"\xff\xfe", b"", disk_key(b"x").encode()):
        assert original_key(disk_key(other)) is None
    (long,) = make_keys(1, "模" * 300)  # too long for a path
    assert original_key(disk_key(long.encode())) is None
    assert disk_key(b"a") != disk_key(b"b")
    data = memoryview(bytearray(ENVELOPE_BYTES + 5))
    envelope = Envelope(Form(1, 3, (1, -2, 3, 4), 2), 77, 12.5, 5)
    envelope.pack_into(data, b"key")
    assert Envelope.unpack(data, b"key") == envelope
    assert Envelope.unpack(data, b"other") is None
    assert Envelope.unpack(data[:-1], b"key") is None
    assert Envelope.unpack(b"", b"key") is None
    data[50] ^= 1
    assert Envelope.unpack(data, b"key") is None
