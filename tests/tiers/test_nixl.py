"""The NIXL tier with NIXL's POSIX backend, on real files."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.cli import main
from kvstrata.config import tier_from_url
from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.tier import TierContract, make_frame, make_keys, read_frames
from kvstrata.tiers.arena import Arena
from kvstrata.tiers.base import Tier
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.tiers.nixl import NixlOptions, NixlTier
from kvstrata.tiers.nixl.agent import Agent
from kvstrata.tiers.nixl.tier import read_url
from kvstrata.tiers.open import open_tier

real = pytest.mark.extra("nixl")


@contextlib.contextmanager
def opened(path: Path, **options: object) -> Iterator[NixlTier]:
    options = {"max_bytes": 200 << 20, "buffer_bytes": 32 << 20} | options
    with contextlib.closing(NixlTier(NixlOptions(path=str(path), **options))) as tier:
        yield tier


@real
@pytest.mark.leaks_allowed("NIXL keeps its event descriptors")
class TestNixlTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with opened(tmp_path) as tier:
            yield tier


@real
@pytest.mark.leaks_allowed("NIXL keeps its event descriptors")
class TestNixlTierWithUring(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with opened(tmp_path, backend_params={"use_uring": "true"}) as tier:
            yield tier


@real
@pytest.mark.leaks_allowed("NIXL keeps its event descriptors")
class TestWithNixl:
    def test_its_files_are_those_of_the_disk_tier(self, tmp_path: Path) -> None:
        keys, frames = make_keys(2), [make_frame(5000, at) for at in range(2)]
        with opened(tmp_path) as tier:
            tier.write(keys[:1], frames[:1])
        disk = DiskTier(DiskOptions(path=str(tmp_path), max_bytes=1 << 20))
        with contextlib.closing(disk):
            assert read_frames(disk, keys[:1]) == [bytes(frames[0])]
            disk.write(keys[1:], frames[1:])
        with opened(tmp_path) as tier:
            assert read_frames(tier, keys) == [bytes(frame) for frame in frames]

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path) -> None:
        """A size limit that the file system does not check when it allocates, but when it is written to."""
        (key,) = make_keys(1)
        with opened(tmp_path) as tier:
            before, handler = (
                resource.getrlimit(resource.RLIMIT_FSIZE),
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            )
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
            try:
                with pytest.raises(TierFull):
                    tier.write([key], [make_frame(2 << 20)])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
                signal.signal(signal.SIGXFSZ, handler)
            assert tier.contains([key]) == [False]
            tier.write([key], [make_frame(2 << 20)])
            assert read_frames(tier, [key], 3 << 20) == [bytes(make_frame(2 << 20))]

    def test_what_nixl_reports_is_unavailable(self, tmp_path: Path) -> None:
        with opened(tmp_path) as tier:
            fd = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
            try:
                with pytest.raises(TierUnavailable, match="POSIX WRITE failed"):
                    tier._agent.write(fd, make_frame(100))
                with pytest.raises(TierUnavailable, match="POSIX READ failed"):
                    tier._agent.read(fd, make_frame(100))
            finally:
                os.close(fd)
            with pytest.raises(TierUnavailable, match="raise buffer_bytes"):
                NixlTierWithLittlePatience(tier).write(make_frame(33 << 20))

    def test_a_transfer_that_does_not_end(self, tmp_path: Path) -> None:
        """Its memory stays lent: the backend may still write to it."""
        with opened(tmp_path) as tier:
            agent = tier._agent
            whole = agent.arena.size_bytes
            agent._timeout_seconds = -1.0
            with pytest.raises(TierUnavailable, match="did not end"), agent.arena.lend([whole // 2], 0):
                agent._wait("handle", "PROC", "READ")
            with pytest.raises(TierUnavailable, match="no room"), agent.arena.lend([whole], 0):
                pass
            with agent.arena.lend([whole // 2], 0):
                pass

    def test_a_backend_that_cannot_be_used(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"moves files with .*POSIX"), opened(tmp_path, backend="UCX"):
            pass

    def test_commands_for_people(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        keys, url = make_keys(3), f"nixl://posix{tmp_path}"
        with opened(tmp_path) as tier:
            tier.write(keys, [make_frame(100)] * 3)
        assert main(["keys", "list", "--tier", url]) == 0
        assert sorted(line.split("\t")[1] for line in capsys.readouterr().out.splitlines()) == sorted(keys)
        assert main(["keys", "show", keys[0], "--tier", url]) == 0
        assert "100" in capsys.readouterr().out
        assert main(["keys", "delete", keys[0], "--tier", url, "--yes"]) == 0
        assert main(["keys", "count", "--tier", url]) == 0
        assert capsys.readouterr().out.split()[-1] == "2"


class NixlTierWithLittlePatience:
    """The agent of a tier, which does not wait for memory."""

    def __init__(self, tier: NixlTier) -> None:
        self._agent = tier._agent
        self._agent._timeout_seconds = 0.0

    def write(self, frame: memoryview) -> None:
        self._agent.write(0, frame)


# -- without NIXL


def test_the_url() -> None:
    options = read_url(NixlOptions(url="nixl://gds_mt/mnt/a%20b?max_bytes=1000&shared=true"))
    assert (options.backend, options.path) == ("GDS_MT", "/mnt/a b")
    assert (options.max_bytes, options.shared) == (1000, True)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nixl://posix", "expected nixl://BACKEND/DIRECTORY"),
        ("nixl:///var/cache", "expected nixl://BACKEND/DIRECTORY"),
        ("nixl://posix/var/cache?max_byte=1", "unknown parameter 'max_byte'"),
        ("nixl://posix/var/cache?fsync=perhaps", "fsync"),
    ],
)
def test_a_wrong_url(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        open_tier(tier_from_url(url))


_MISSING = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("nixl") else find(name, *rest)
sys.modules["nixl"] = None
from kvstrata.cli import main
sys.exit(main(["keys", "list", "--tier", "nixl://posix/tmp/nowhere"]))
"""


def test_a_missing_library_is_one_clear_line() -> None:
    done = subprocess.run([sys.executable, "-c", _MISSING], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("install it with: pip install 'kvstrata[nixl]'\n")
    assert done.stderr.count("\n") == 1


def test_a_frame_is_never_lent_what_another_has() -> None:
    arena = Arena(1 << 20, "buffer_bytes")
    with arena.lend([1 << 19, 1 << 18], 0) as [first, second]:
        assert second[0] >= first[0] + (1 << 19) or first[0] >= second[0] + (1 << 18)
        with pytest.raises(TierUnavailable, match="no room"), arena.lend([1 << 18, 1 << 18], 0):
            pass
        with arena.lend([1 << 18], 0):
            pass
    with arena.lend([1 << 20], 0) as [(_, memory)]:
        assert len(memory) == 1 << 20


class StuckLibrary:
    """What an agent calls, with transfers that never end."""

    def __init__(self) -> None:
        self.files: list[int] = []

    def register_memory(self, described: list[tuple[int, int, int, str]], kind: str, backends: object) -> str:
        self.files += [fd for _, _, fd, _ in described]
        return "registered"

    def get_xfer_descs(self, described: object, kind: str) -> object:
        return described

    def initialize_xfer(self, *_: object, backends: object) -> str:
        return "handle"

    def transfer(self, handle: str) -> str:
        return "PROC"

    check_xfer_state = transfer


def test_a_stuck_transfer_keeps_its_file(tmp_path: Path) -> None:
    agent = object.__new__(Agent)
    library = StuckLibrary()
    agent._agent, agent._backend, agent._timeout_seconds = library, "POSIX", 0.01
    agent._stuck, agent._lock, agent.arena = [], threading.Lock(), Arena(1 << 20, "buffer_bytes")
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(TierUnavailable, match="did not end"):
            agent.write(file.fileno(), make_frame(100))
        theirs = os.fstat(file.fileno()).st_ino
    (own,) = library.files
    try:
        assert os.fstat(own).st_ino == theirs, "its number is not another file's"
    finally:
        os.close(own)
