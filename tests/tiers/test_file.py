from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.tier import (
    TierContract,
    check_a_key_too_long_for_a_path,
    make_frame,
    make_keys,
    read_frames,
)
from kvstrata.tiers.base import Tier
from kvstrata.tiers.file import FileOptions, FileTier, cleaner, state
from kvstrata.tiers.file.clock import ServerClock
from kvstrata.tiers.file.state import STATE, Lease
from kvstrata.tiers.paths import key_path
from kvstrata.types import Miss, MissReason

END_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\n"

WRITER = (
    END_WITH_PARENT
    + """
import hashlib, random, sys
from kvstrata.errors import TierFull
from kvstrata.tiers.file import FileOptions, FileTier, cleaner, state
state.LEASE_SECONDS, cleaner.PATIENCE_SECONDS = 0.3, 0.1
tier = FileTier(FileOptions(path=sys.argv[1], max_bytes=20_000_000))
rng = random.Random(int(sys.argv[2]))
keys = [f"vllm@m@1@0@{number:064x}" for number in range(200)]
print("started", flush=True)
while True:
    body = rng.randbytes(rng.randrange(1, 1_000_000))
    try:
        tier.write([rng.choice(keys)], [memoryview(hashlib.sha256(body).digest() + body)])
    except TierFull:
        pass
    buffer = memoryview(bytearray(1_000_032))
    (size,) = tier.read([rng.choice(keys)], [buffer])
    if isinstance(size, int):
        assert buffer[:32] == hashlib.sha256(buffer[32:size]).digest()
"""
)

MOUNTED = (
    END_WITH_PARENT
    + """
import os, subprocess, sys
from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.tiers.file import FileOptions, FileTier
path, keys = sys.argv[1], make_keys(12)
tier = FileTier(FileOptions(path=path, max_bytes=1 << 30))
try:
    for at, key in enumerate(keys):
        tier.write([key], [make_frame(1_000_000, at)])
except TierFull as error:
    print("full:", error)
held = sum(tier.contains(keys))
assert 3 <= held <= 8, held
assert read_frames(tier, keys[:1]) == [bytes(make_frame(1_000_000, 0))]
assert not [name for _, _, names in os.walk(path) for name in names if name.endswith(".new")]
tier.delete(keys[1:3])
tier.write(keys[2:3], [make_frame(1_000_000, 2)])
subprocess.run(["mount", "-o", "remount,ro", path], check=True)
for operation, expected in (
    (lambda: tier.write(keys[1:2], [make_frame(10)]), TierFull),  # which is no reason to stop reading
    (lambda: tier.delete(keys[2:3]), TierUnavailable),
):
    try:
        operation()
    except expected as error:
        print("read-only:", error)
assert read_frames(tier, keys[2:3]) == [bytes(make_frame(1_000_000, 2))]
reader = FileTier(FileOptions(path=path, max_bytes=1 << 30))
assert read_frames(reader, keys[2:3]) == [bytes(make_frame(1_000_000, 2))]
reader.close()
subprocess.run(["umount", path], check=True)
for operation in (
    lambda: tier.contains(keys), lambda: read_frames(tier, keys), lambda: list(tier.scan()),
    lambda: tier.write(keys[:1], [make_frame(10)]), lambda: tier.delete(keys[:1]),
):
    try:
        operation()
    except TierUnavailable as error:
        print("unmounted:", error)
assert os.listdir(path) == [], "nothing was written to what lies below the mount"
"""
)


def open_tier(path: Path, max_bytes: int = 200_000_000, **options: object) -> FileTier:
    return FileTier(FileOptions(path=str(path), max_bytes=max_bytes, **options))


def frames_in(path: Path) -> list[Path]:
    """Frames, and what writers have not finished."""
    return [file for file in path.rglob("*") if file.suffix in (".kv", ".new")]


def used_bytes(path: Path) -> int:
    total = 0
    for file in frames_in(path):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def set_age(path: Path, key: str, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(path / key_path(key), (moment, moment))


@pytest.fixture
def keys() -> list[str]:
    return make_keys(20)


class TestFileTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with contextlib.closing(open_tier(tmp_path)) as tier:
            yield tier


class TestFileTierWithFsyncAndTimeToLive(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with contextlib.closing(open_tier(tmp_path, fsync=True, ttl_seconds=3600)) as tier:
            yield tier

    test_large_batches = None  # 1,500 waits for the device
    test_scan_of_many_while_deleting = None


# -- several writers


def test_writers_see_each_other_at_once(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path)) as one, contextlib.closing(open_tier(tmp_path)) as other:
        one.write(keys[:2], [make_frame(1000, at) for at in range(2)])
        assert other.contains(keys[:3]) == [True, True, False]
        assert read_frames(other, keys[:1]) == [bytes(make_frame(1000))]
        other.write(keys[:1], [make_frame(2000, 7)])
        assert read_frames(one, keys[:1]) == [bytes(make_frame(2000, 7))]
        assert other.delete(keys[:2]) == 2
        assert read_frames(one, keys[:1]) == [Miss(MissReason.ABSENT)]


@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_writers_that_are_killed_leave_whole_frames_within_the_budget(
    tmp_path: Path, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, seen, writers = random.Random(rounds), 0, []
    slack = 8_000_000  # two frames for each writer, those of a round and those of the round before

    def start(number: int) -> None:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)], stdout=subprocess.PIPE
        )
        writers.append(writer)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"started\n"

    def kill(writer: subprocess.Popen[bytes]) -> None:
        assert writer.poll() is None, "a writer has read wrong bytes"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()

    start(0)
    try:
        for number in range(1, rounds + 1):
            start(number)
            until = time.monotonic() + rng.uniform(0.1, 0.4)
            while time.monotonic() < until:
                assert used_bytes(tmp_path) <= 20_000_000 + slack
            kill(writers.pop(0))
            for file in tmp_path.rglob("*.kv"):
                with contextlib.suppress(FileNotFoundError):  # the other one goes on cleaning
                    frame = file.read_bytes()
                    assert frame[:32] == hashlib.sha256(frame[32:]).digest()
                    seen += 1
    finally:
        for writer in writers:
            kill(writer)
    assert seen
    monkeypatch.setattr(state, "LEASE_SECONDS", 0.2)
    with contextlib.closing(open_tier(tmp_path, 20_000_000)) as tier:
        deadline = time.monotonic() + 10  # the lease of one who was killed is watched for a while
        while used_bytes(tmp_path) > 17_500_000 + 1000 and time.monotonic() < deadline:
            tier.write(make_keys(1), [make_frame(1000)])
        assert used_bytes(tmp_path) <= 17_500_000 + 1000, "one who comes later has cleaned"


# -- the budget


def test_the_least_recently_used_go(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path, 16_000)) as tier:
        for at, key in enumerate(keys[:14]):
            tier.write([key], [make_frame(1000, at)])
            set_age(tmp_path, key, 1000 - at)
        read_frames(tier, keys[:1])  # its last use is long ago, so that this one is noted
        for at, key in enumerate(keys[14:18]):
            tier.write([key], [make_frame(1000, at)])
        held = tier.contains(keys[:18])
        assert used_bytes(tmp_path) <= 16_000
        assert held[0], "it was read"
        assert not held[1]
        assert held[2:] == sorted(held[2:]), "the oldest go first"
        assert 13 <= sum(held) <= 16


def test_a_use_is_noted_without_changing_the_time_of_writing(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        tier.write(keys[:1], [make_frame(10)])
        set_age(tmp_path, keys[0], 5000)
        read_frames(tier, keys[:1])
        status = (tmp_path / key_path(keys[0])).stat()
    assert time.time() - status.st_mtime > 4000
    assert time.time() - status.st_atime < 1000


def test_a_frame_larger_than_the_budget_is_refused(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path, 5000)) as tier:
        with pytest.raises(TierFull):
            tier.write(keys[:1], [make_frame(5001)])
        assert frames_in(tmp_path) == []


def test_a_large_directory_is_cleaned_in_slices(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "SLICE_SECONDS", 0.0)  # no step of the walk fits
    with contextlib.closing(open_tier(tmp_path, 1 << 30)) as tier:
        tier.write(keys[:3], [make_frame(1000)] * 3)
        assert tier.stats().used_bytes is None, "no cleaning has ended"
        monkeypatch.setattr(cleaner, "SLICE_SECONDS", 5.0)
        tier.write(keys[3:4], [make_frame(1000)])
        assert tier.stats().used_bytes == 4000
        assert tier.stats().budget_bytes == 1 << 30


def test_who_may_not_clean_stops_at_its_quota(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "PATIENCE_SECONDS", 0.05)
    with contextlib.closing(open_tier(tmp_path, 64_000)) as tier:
        (tmp_path / STATE / "cleaner").write_text("another host")
        with pytest.raises(TierFull, match="has not kept up"):
            tier.write(keys, [make_frame(1000)] * 20)
        assert used_bytes(tmp_path) <= 2000
        (tmp_path / STATE / "cleaner").unlink()
        tier.write(keys[5:6], [make_frame(1000)])
        assert tier.contains(keys[5:6]) == [True]


def test_frames_expire_by_the_time_they_were_written(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path, ttl_seconds=100)) as tier:
        tier.write(keys[:2], [make_frame(1000)] * 2)
        set_age(tmp_path, keys[0], 101)
        assert tier.contains(keys[:3]) == [False, True, False]
        assert read_frames(tier, keys[:2]) == [Miss(MissReason.EXPIRED), bytes(make_frame(1000))]
    with contextlib.closing(open_tier(tmp_path, ttl_seconds=100)) as tier:
        tier.write(keys[2:3], [make_frame(1000)])
        tier._cleaner._noted_at -= cleaner.INTERVAL_SECONDS + 1
        tier.write(keys[3:4], [make_frame(1000)])
        assert not (tmp_path / key_path(keys[0])).exists()
        assert tier.contains(keys[1:4]) == [True] * 3


def test_unfinished_files_go_when_old_and_foreign_ones_stay(tmp_path: Path, keys: list[str]) -> None:
    digest = "ab" * 32
    foreign = ("notes.txt", f"{digest}.kv", f"vllm@m@1/x/ab/{digest}.kv", f"vllm@m@1/0/ab/{digest}.kv.bak")
    unfinished = ("vllm@m@1/0/ab/.host-1-ab-0.new", "vllm@m@1/0/ab/.host-2-ab-0.new")
    for name in (*foreign, *unfinished):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10_000))
    os.utime(tmp_path / unfinished[0], (time.time() - cleaner.UNFINISHED_SECONDS - 10,) * 2)
    with contextlib.closing(open_tier(tmp_path, 11_000)) as tier:
        assert list(tier.scan()) == []
        tier.write(keys[:1], [make_frame(100)])
        assert list(tier.scan()) == keys[:1]
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left - {f"{STATE}/cleaned"} == {*foreign, unfinished[1], key_path(keys[0])}


def test_a_cleaning_that_fails_has_not_cleaned(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> Iterator[os.DirEntry[str]]:
        raise OSError(errno.EIO, "broken", path)

    with contextlib.closing(open_tier(tmp_path, 64_000)) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(cleaner, "entries_of", broken)
            for key in keys[:4]:
                with pytest.raises(TierUnavailable, match="broken"):
                    tier.write([key], [make_frame(1000)])
                assert not list((tmp_path / STATE).iterdir()), "others may clean"
        for key in keys:
            tier.write([key], [make_frame(10_000)])
            assert used_bytes(tmp_path) <= 64_000


def test_files_that_must_stay_do_not_end_a_cleaning(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == Path(key_path(keys[0])).name:
            raise PermissionError(errno.EACCES, "not yours")
        unlink(path, missing_ok=missing_ok)

    with contextlib.closing(open_tier(tmp_path, 64_000)) as tier, monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        for key in keys:
            tier.write([key], [make_frame(10_000)])
            assert used_bytes(tmp_path) <= 64_000
        assert tier.contains(keys[:1]) == [True]


def test_a_device_without_room_for_what_a_cleaning_found_keeps_no_lease(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with contextlib.closing(open_tier(tmp_path)) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="full"):
                tier._cleaner.admit(200_000_000)
        assert not list((tmp_path / STATE).iterdir())
        tier.write(keys[:1], [make_frame(1000)])


# -- the lease


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    (tmp_path / STATE).mkdir()
    lease = Lease(str(tmp_path), ServerClock())
    yield lease
    lease.release()


def test_one_at_a_time(tmp_path: Path, lease: Lease) -> None:
    other = Lease(str(tmp_path), ServerClock())
    assert lease.take()
    assert not other.take()
    assert lease.renew()
    lease.release()
    assert other.take()
    other.release()
    assert list((tmp_path / STATE).iterdir()) == []


def test_a_lease_left_behind_is_taken_over_and_its_holder_finds_out(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LEASE_SECONDS", 0.05)
    monkeypatch.setattr(state, "RENEW_SECONDS", 0.0)
    other = Lease(str(tmp_path), ServerClock())
    assert lease.take()
    deadline = time.monotonic() + 5
    while not other.take():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not lease.renew()
    assert other.renew()
    lease.release()
    assert other.renew(), "what is no longer ours is not removed"
    other.release()


def test_a_lease_that_is_renewed_is_never_stale(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(state, "RENEW_SECONDS", 0.0)
    other = Lease(str(tmp_path), ServerClock())
    assert lease.take()
    for _ in range(30):
        assert lease.renew()
        assert not other.take()
        time.sleep(0.02)


# -- the file system


def test_a_full_device_a_read_only_one_and_one_that_is_gone(tmp_path: Path) -> None:
    mount = ["-Urm", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"', str(tmp_path)]
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, *mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("system: needs unshare (util-linux) and user namespaces to mount a small tmpfs")
    done = subprocess.run(
        [unshare, *mount, sys.executable, "-c", MOUNTED, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert lines == ["full", *["read-only"] * 2, *["unmounted"] * 5]


def test_a_directory_that_vanishes_is_unavailable_and_one_that_was_emptied_is_empty(
    tmp_path: Path, keys: list[str]
) -> None:
    root = tmp_path / "kv"
    root.mkdir()
    with contextlib.closing(open_tier(root)) as tier:
        tier.write(keys[:1], [make_frame(1000)])
        for entry in root.iterdir():
            shutil.rmtree(entry)
        assert tier.contains(keys[:1]) == [False]
        tier.write(keys[:1], [make_frame(1000)])
        assert tier.contains(keys[:1]) == [True]
        shutil.rmtree(root)
        for operation in (
            lambda: tier.contains(keys),
            lambda: read_frames(tier, keys),
            lambda: tier.write(keys[:1], [make_frame(10)]),
            lambda: tier.delete(keys[:1]),
            lambda: list(tier.scan()),
        ):
            with pytest.raises(TierUnavailable):
                operation()
        assert not root.exists()


def test_a_key_too_long_for_a_path_is_refused_and_not_held(tmp_path: Path) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        check_a_key_too_long_for_a_path(tier)


def test_settings_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "absent"):
        with pytest.raises(ConfigError, match="is it mounted"):
            open_tier(path)
    with pytest.raises(ConfigError, match="max_bytes"):
        open_tier(tmp_path, 0)
    with pytest.raises(ConfigError, match="ttl_seconds"):
        open_tier(tmp_path, ttl_seconds=0)
    with contextlib.closing(open_tier(tmp_path)) as tier, pytest.raises(ValueError, match="not a key"):
        tier.write(["nonsense"], [make_frame(10)])
