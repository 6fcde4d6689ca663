from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.config.tiers import NO_BUDGET_BYTES
from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.tier import (
    TierContract,
    check_a_key_too_long_for_a_path,
    make_frame,
    make_keys,
    namespace,
    read_frames,
)
from kvstrata.tiers.base import Tier
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.disk.staging import STAGING, STAGING_AGE_SECONDS
from kvstrata.tiers.paths import key_path, path_key
from kvstrata.types import Miss, MissReason

END_WITH_PARENT = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\n"

WRITER = (
    END_WITH_PARENT
    + """
import hashlib, random, sys
from kvstrata.tiers.disk import DiskOptions, DiskTier
tier = DiskTier(DiskOptions(path=sys.argv[1], max_bytes=20_000_000))
rng = random.Random(int(sys.argv[2]))
keys = [f"vllm@m@1@0@{number:064x}" for number in range(30)]
print("started", flush=True)
while True:
    body = rng.randbytes(rng.randrange(1, 2_000_000))
    tier.write([rng.choice(keys)], [memoryview(hashlib.sha256(body).digest() + body)])
"""
)

READ_ONLY = """
import subprocess, sys
from kvstrata.errors import TierFull
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.tiers.disk import DiskOptions, DiskTier, index
keys, frames = make_keys(10), [make_frame(1000, at) for at in range(10)]
index.TOUCH_SECONDS = 0.0
tier = DiskTier(DiskOptions(path=sys.argv[1], max_bytes=4000))
tier.write(keys[:4], frames[:4])
# The system itself does it whoever has files open; others may not, but may put a read-only mount in its place.
for how in (["--bind", sys.argv[1]], ["-o", "remount,bind,ro"]):
    subprocess.run(["mount", *how, sys.argv[1]], check=True)
for at in range(4, 9):
    assert read_frames(tier, keys[:4]) == [bytes(frame) for frame in frames[:4]]
    try:
        tier.write([keys[at]], [frames[at]])
    except TierFull:  # it may still be read
        print("cannot write")
    assert tier.contains(keys) == [True] * 4 + [False] * 6
    assert tier.stats().used_bytes == 4000
subprocess.run(["umount", sys.argv[1]], check=True)
tier.write(keys[9:], frames[9:])
assert sum(tier.contains(keys)) == 4, "nothing was set aside for what was not written"
assert read_frames(tier, keys[9:]) == [bytes(frames[9])]
tier.close()
"""

FILL = """
import os, sys
from kvstrata.errors import TierFull
from kvstrata.testing.tier import make_frame, make_keys, read_frames
from kvstrata.tiers.disk import DiskOptions, DiskTier
tier = DiskTier(DiskOptions(path=sys.argv[1] + "/kv", max_bytes=1 << 30))
keys = make_keys(20)
for at, key in enumerate(keys):
    tier.write([key], [make_frame(1_000_000, at)])
held = tier.contains(keys)
assert held[-1] and 3 <= sum(held) <= 8, held
assert held == sorted(held), "the oldest go first"
frames = read_frames(tier, keys[-3:])
assert frames == [bytes(make_frame(1_000_000, at)) for at in (17, 18, 19)]
with open(sys.argv[1] + "/foreign", "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
try:
    tier.write(make_keys(1, seed=1), [make_frame(12_000_000)])
except TierFull as error:
    print("full:", error)
os.unlink(sys.argv[1] + "/foreign")
tier.write(keys[:1], [make_frame(1_000_000, 7)])
assert read_frames(tier, keys[:1]) == [bytes(make_frame(1_000_000, 7))]
assert os.listdir(tier._staging._directory) == ["lock"], "nothing unfinished is left"
tier.close()
print("passed")
"""


def open_tier(path: Path, max_bytes: int = 100_000_000, **options: object) -> DiskTier:
    return DiskTier(DiskOptions(path=str(path), max_bytes=max_bytes, **options))


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


class TestDiskTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with contextlib.closing(open_tier(tmp_path / "kv")) as tier:
            yield tier


class TestSharedDiskTierWithFsync(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with contextlib.closing(open_tier(tmp_path / "kv", fsync=True, shared=True)) as tier:
            yield tier

    test_large_batches = None  # 1,500 waits for the device
    test_scan_of_many_while_deleting = None


@pytest.fixture
def keys() -> list[str]:
    return make_keys(10)


def test_the_budget_is_kept_and_the_least_recently_used_go(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path, 5000)) as tier:
        for at, key in enumerate(keys[:5]):
            tier.write([key], [make_frame(1000, at)])
        read_frames(tier, keys[:1])
        tier.write(keys[5:7], [make_frame(1000, 5), make_frame(1000, 6)])
        assert tier.contains(keys[:7]) == [True, False, False, True, True, True, True]
        assert tier.stats().used_bytes == 5000
        assert sum((tmp_path / file).stat().st_size for file in files(tmp_path)) == 5000


def test_writers_that_begin_together_keep_the_budget(tmp_path: Path) -> None:
    with contextlib.closing(open_tier(tmp_path, 1_000_000)) as tier, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: tier.write([key], [make_frame(600_000)]), make_keys(40)))
        assert tier.stats().used_bytes == 600_000
        assert len(list(tier.scan())) == 1


def test_overwriting_does_not_use_budget_twice(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path, 10_000)) as tier:
        for size in (1000, 3000, 2000):
            tier.write(keys[:2], [make_frame(size)] * 2)
        assert tier.stats().used_bytes == 4000
        assert tier.stats().entries == 2


def test_a_frame_larger_than_the_budget_is_refused_and_evicts_nothing(
    tmp_path: Path, keys: list[str]
) -> None:
    with contextlib.closing(open_tier(tmp_path, 5000)) as tier:
        tier.write(keys[:1], [make_frame(1000)])
        with pytest.raises(TierFull):
            tier.write(keys[1:2], [make_frame(5001)])
        assert tier.contains(keys[:2]) == [True, False]


def test_a_restart_finds_entries_in_their_order_of_use(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        tier.write(keys, [make_frame(1000, at) for at in range(10)])
    for at, key in enumerate(keys):
        moment = 1_700_000_000 + (7 * at) % 10
        os.utime(tmp_path / key_path(key), (moment, moment))
    oldest = sorted(range(10), key=lambda at: (7 * at) % 10)[:3]
    with contextlib.closing(open_tier(tmp_path, 10_000)) as tier:
        assert tier.stats().entries == 10
        assert tier.stats().used_bytes == 10_000
        tier.write(make_keys(1, seed=1), [make_frame(3000)])
        assert [at for at, held in enumerate(tier.contains(keys)) if not held] == sorted(oldest)
        assert read_frames(tier, keys)[9 if 9 not in oldest else 8] is not None
    with contextlib.closing(open_tier(tmp_path, 4000)) as tier:
        assert tier.stats().used_bytes <= 4000, "a smaller budget holds from the start"


def test_reading_notes_the_use_for_the_next_start(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        tier.write(keys[:1], [make_frame(10)])
    path = tmp_path / key_path(keys[0])
    os.utime(path, (1000, 1000))
    with contextlib.closing(open_tier(tmp_path)) as tier:
        read_frames(tier, keys[:1])
    assert path.stat().st_mtime > 1000


def test_foreign_files_are_never_touched(tmp_path: Path, keys: list[str]) -> None:
    digest = "ab" * 32
    foreign = [
        "notes.txt",
        f"{digest}.kv",
        f"org/0/ab/{digest}.kv",
        f"vllm@m@1/0/cd/{digest}.kv",
        f"vllm@m@1/x/ab/{digest}.kv",
        f"vllm@m@1/0/ab/{digest[:-1]}.kv",
        f"vllm@m@1/0/ab/{digest}.kv.bak",
        f"{STAGING}/README",
    ]
    for name in foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    (tmp_path / "loop@").symlink_to(tmp_path)
    with contextlib.closing(open_tier(tmp_path, 2500)) as tier:
        assert list(tier.scan()) == []
        assert tier.stats().entries == 0
        for key in keys:
            tier.write([key], [make_frame(1000)])
        tier.delete(list(tier.scan()))
    assert files(tmp_path) == set(foreign)


def test_a_truncated_file_reads_as_a_short_count(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        tier.write(keys[:2], [make_frame(100_000, at) for at in range(2)])
        os.truncate(tmp_path / key_path(keys[0]), 60_000)
        os.truncate(tmp_path / key_path(keys[1]), 0)
        short, empty = read_frames(tier, keys[:2])
        assert short == bytes(make_frame(100_000)[:60_000])
        assert empty == b""
        assert tier.stats().used_bytes == 60_000


def test_two_processes_share_a_directory(tmp_path: Path, keys: list[str]) -> None:
    with (
        contextlib.closing(open_tier(tmp_path, shared=True)) as one,
        contextlib.closing(open_tier(tmp_path, shared=True)) as other,
    ):
        one.write(keys[:2], [make_frame(1000, at) for at in range(2)])
        assert other.contains(keys[:3]) == [True, True, False]
        assert read_frames(other, keys[:1]) == [bytes(make_frame(1000))]
        assert other.stats().entries == 1
        assert other.delete(keys[:2]) == 2
        assert one.contains(keys[:2]) == [False, False]
        assert read_frames(one, keys[:1]) == [Miss(MissReason.EVICTED)]
        assert read_frames(one, keys[:1]) == [Miss(MissReason.ABSENT)]
        assert one.stats().entries == 1


def test_a_deleted_file_is_a_miss_and_then_known_to_be_gone(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        tier.write(keys[:2], [make_frame(1000)] * 2)
        (tmp_path / key_path(keys[0])).unlink()
        assert read_frames(tier, keys[:1]) == [Miss(MissReason.EVICTED)]
        assert tier.contains(keys[:2]) == [False, True]
        assert tier.stats().used_bytes == 1000


def test_a_directory_deleted_below_the_tier_is_made_again(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path / "kv")) as tier:
        tier.write(keys[:2], [make_frame(1000)] * 2)
        shutil.rmtree(tmp_path / "kv")
        assert all(isinstance(result, Miss) for result in read_frames(tier, keys[:2]))
        tier.write(keys[:1], [make_frame(1000, 3)])
        assert read_frames(tier, keys[:1]) == [bytes(make_frame(1000, 3))]


def test_faults_of_the_file_system_are_tier_errors(tmp_path: Path, keys: list[str]) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        (tmp_path / key_path(keys[0]).split("/")[0]).write_text("in the way")
        assert tier.contains(keys[:1]) == [False]
        assert read_frames(tier, keys[:1]) == [Miss(MissReason.ABSENT)]
        assert tier.delete(keys[:1]) == 0
        with pytest.raises(TierUnavailable):
            tier.write(keys[:1], [make_frame(10)])
        assert (tmp_path / key_path(keys[0]).split("/")[0]).read_text() == "in the way"


@pytest.mark.parametrize(
    "key", ["", "x", "a@b@c@d@e", "vllm@m@1@0@" + "AB" * 32, "vllm@../m@1@/@" + "ab" * 32]
)
def test_what_is_no_key_is_not_held_and_not_written(tmp_path: Path, key: str) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        assert tier.contains([key]) == [False]
        assert read_frames(tier, [key]) == [Miss(MissReason.ABSENT)]
        assert tier.delete([key]) == 0
        with pytest.raises(ValueError, match="not a key"):
            tier.write([key], [make_frame(10)])


def test_a_key_too_long_for_a_path_is_refused_and_not_held(tmp_path: Path) -> None:
    with contextlib.closing(open_tier(tmp_path)) as tier:
        check_a_key_too_long_for_a_path(tier)


def test_settings_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="path of the disk tier"):
        open_tier(tmp_path / "file")
    with pytest.raises(ConfigError, match="max_bytes"):
        open_tier(tmp_path, 0)


def test_unfinished_files_go_when_their_writer_is_gone_or_they_are_old(tmp_path: Path) -> None:
    with contextlib.closing(open_tier(tmp_path)) as alive:
        fd, living = alive._staging.create()
        os.close(fd)
        for name, lock, age in (
            ("dead", True, 0),
            ("young", False, 0),
            ("old", False, STAGING_AGE_SECONDS + 9),
        ):
            directory = tmp_path / STAGING / name
            directory.mkdir()
            (directory / "0").write_bytes(b"unfinished")
            if lock:
                (directory / "lock").touch()
            os.utime(directory, (time.time() - age,) * 2)
        open_tier(tmp_path).close()
        left = {entry.name for entry in (tmp_path / STAGING).iterdir()}
        assert left == {"young", Path(living).parent.name}
        assert Path(living).exists()


def test_several_that_start_at_once_remove_what_the_dead_left(tmp_path: Path) -> None:
    for _ in range(5):
        for number in range(30):
            dead = tmp_path / STAGING / f"dead{number}"
            dead.mkdir(parents=True)
            for name in ("lock", "0"):
                (dead / name).touch()
        start = threading.Barrier(3)

        def open_and_close(_: int, start: threading.Barrier = start) -> None:
            start.wait()
            open_tier(tmp_path).close()

        with ThreadPoolExecutor(3) as threads:
            list(threads.map(open_and_close, range(3)))
        open_tier(tmp_path).close()
        assert list((tmp_path / STAGING).iterdir()) == []


@given(
    model=st.text(min_size=1, max_size=100),
    worker=st.integers(0, 10**6),
    digest=st.binary(min_size=32, max_size=32),
)
def test_keys_and_paths_are_one_to_one(model: str, worker: int, digest: bytes) -> None:
    try:
        key = namespace(model).key(digest, worker)
    except UnicodeEncodeError:
        return  # lone surrogates are no model names
    path = key_path(key)
    assert path is not None
    assert path_key(path) == key
    parts = path.split("/")
    assert all(part not in ("", ".", "..") and len(part) < 256 for part in parts)


@given(st.text(max_size=100))
def test_any_path_is_taken_apart_without_a_crash(path: str) -> None:
    key = path_key(path + "/0/ab/" + "ab" * 32 + ".kv")
    assert key is None or key_path(key) is not None


@pytest.mark.parametrize("rounds", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_while_writing_leaves_whole_frames_only(tmp_path: Path, rounds: int) -> None:
    rng, seen = random.Random(rounds), 0
    for number in range(rounds):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(number)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"started\n"
        time.sleep(rng.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with contextlib.closing(open_tier(tmp_path, 20_000_000)) as tier:
            held = list(tier.scan())
            for frame in read_frames(tier, held, room=2_000_032):
                assert isinstance(frame, bytes)
                assert frame[:32] == hashlib.sha256(frame[32:]).digest()
            seen += len(held)
            assert (tier.stats().used_bytes or 0) <= 20_000_000
            assert len(list((tmp_path / STAGING).iterdir())) == 1, "what the dead left is gone"
    assert seen


def run_on_small_device(program: str, path: Path) -> str:
    """What a program prints that has a device of 8 MiB of its own at ``path``, which it is given."""
    mount = ["-Urm", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"', str(path)]
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, *mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("system: needs unshare (util-linux) and user namespaces to mount a small tmpfs")
    done = subprocess.run(
        [unshare, *mount, sys.executable, "-c", END_WITH_PARENT + program, str(path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_device_evicts_then_refuses_then_goes_on(tmp_path: Path) -> None:
    printed = run_on_small_device(FILL, tmp_path)
    assert "full:" in printed
    assert "passed" in printed


def test_a_device_that_becomes_read_only_is_read(tmp_path: Path) -> None:
    """As file systems do after an error. A use that cannot be noted in the file's times does not matter."""
    assert run_on_small_device(READ_ONLY, tmp_path).count("cannot write") == 5


def test_a_file_that_the_device_cannot_read_is_dropped(tmp_path: Path, keys: list[str]) -> None:
    """Or each look-up would promise it, and each read of it be a fault of the whole tier."""
    with contextlib.closing(open_tier(tmp_path)) as tier:
        tier.write(keys[:2], [make_frame(1000, at) for at in range(2)])
        path = tmp_path / key_path(keys[0])
        path.unlink()
        path.symlink_to("/proc/self/mem")  # whose first bytes are a read error (EIO)
        with pytest.raises(TierUnavailable, match=os.strerror(errno.EIO)):
            read_frames(tier, keys[:1])
        assert tier.contains(keys[:2]) == [False, True]
        tier.write(keys[:1], [make_frame(1000, 7)])
        assert read_frames(tier, keys[:2]) == [bytes(make_frame(1000, 7)), bytes(make_frame(1000, 1))]


def test_a_file_size_limit_is_a_full_tier(tmp_path: Path, keys: list[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.closing(open_tier(tmp_path)) as tier:
        tier.write(keys[:1], [make_frame(50_000)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(TierFull):
                tier.write(keys[1:2], [make_frame(100_001)])
            tier.write(keys[2:3], [make_frame(60_000, 2)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert tier.contains(keys[:3]) == [True, False, True]
        assert tier.stats().used_bytes == 110_000
        assert len(files(tmp_path)) == 3, "two frames and the lock"


def test_a_directory_that_others_have_open_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = DiskOptions(path=str(tmp_path), max_bytes=1 << 20)
    with contextlib.closing(DiskTier(options)):
        assert not caplog.messages
        for changes in ({"shared": True}, {"max_bytes": NO_BUDGET_BYTES}):  # meant so; only a look
            DiskTier(msgspec.structs.replace(options, **changes)).close()
        assert not caplog.messages
        DiskTier(options).close()
    (said,) = caplog.messages
    assert f"1 other process(es) have {tmp_path} open" in said
    caplog.clear()
    DiskTier(options).close()
    assert not caplog.messages
