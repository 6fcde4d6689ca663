"""The Mooncake tier against a real master, over TCP."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

pytest.importorskip(
    "mooncake.store", reason="system: wants libibverbs1 and kvstrata[mooncake]", exc_type=ImportError
)

from kvstrata.cli import main
from kvstrata.config import tier_from_url
from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.mooncake_server import MooncakeMaster, MooncakeNode
from kvstrata.testing.process import free_port
from kvstrata.testing.tier import TierContract, make_frame, make_keys, read_frames
from kvstrata.tiers.base import Tier
from kvstrata.tiers.mooncake import MooncakeOptions, MooncakeTier
from kvstrata.tiers.open import open_tier
from kvstrata.tiers.seal import make_seal
from kvstrata.types import Miss, MissReason

pytestmark = [
    pytest.mark.system,
    pytest.mark.leaks_allowed("the library opens connections when it likes; what it keeps is tested below"),
]


@pytest.fixture(scope="module")
def master() -> Iterator[MooncakeMaster]:
    with MooncakeMaster() as master:
        yield master


@pytest.fixture(scope="module")
def joined(master: MooncakeMaster) -> Iterator[MooncakeTier]:
    """One tier for all tests: joining and leaving a cluster takes two seconds."""
    tier = MooncakeTier(MooncakeOptions(url=master.url))
    tier.write(make_keys(1), [make_frame(10)])
    yield tier
    MooncakeTier.close(tier)


@pytest.fixture
def tier(joined: MooncakeTier, monkeypatch: pytest.MonkeyPatch) -> MooncakeTier:
    monkeypatch.setattr(joined, "close", lambda: None)
    joined.delete(list(joined.scan()))
    return joined


class TestMooncakeTier(TierContract):
    @pytest.fixture
    def tier(self, tier: MooncakeTier) -> Tier:
        return tier


@contextlib.contextmanager
def joined_to(
    master: MooncakeMaster, *, global_segment_size: int = 256 << 20, timeout_seconds: float = 5
) -> Iterator[MooncakeTier]:
    url = f"mooncakestore://127.0.0.1:{master.port}?master_http_port={master.http_port}"
    options = MooncakeOptions(
        url=url, global_segment_size=global_segment_size, timeout_seconds=timeout_seconds
    )
    with contextlib.closing(MooncakeTier(options)) as tier:
        yield tier


# -- objects


def test_who_does_not_write_gives_no_memory(master: MooncakeMaster, tier: MooncakeTier) -> None:
    """``kvstrata keys`` must not be given other nodes' objects, to take them along when it ends."""
    keys = make_keys(2)
    tier.write(keys, [make_frame(100)] * 2)
    before = tier.stats().budget_bytes
    with joined_to(master) as reader:
        assert read_frames(reader, keys) == [bytes(make_frame(100))] * 2
        assert sorted(reader.scan()) == sorted(keys)
        assert reader.delete(keys) == 2
        assert tier.stats().budget_bytes == before
    assert tier.contains(keys) == [False, False]


def test_objects_of_others(tier: MooncakeTier) -> None:
    own, short, foreign, moved = make_keys(4)
    tier.write([own], [make_frame(500)])
    put(tier, "vllm's own object", b"x" * 100)
    put(tier, short, b"short")
    put(tier, foreign, b"x" * 500)
    put(tier, moved, bytes(make_frame(500)) + make_seal(own, make_frame(500)))
    assert sorted(tier.scan()) == sorted([own, short, foreign, moved])
    frame, *misses = read_frames(tier, [own, short, foreign, moved])
    assert frame == bytes(make_frame(500))
    assert [miss.reason for miss in misses if isinstance(miss, Miss)] == [MissReason.CORRUPT] * 3
    tier._store.remove(["vllm's own object"])


def put(tier: MooncakeTier, key: str, value: bytes) -> None:
    """Store what no tier would."""
    with tier._store.arena.lend([len(value)], 1) as [(address, memory)]:
        memory[:] = value
        tier._store.put_from(key, address, len(value))


def test_a_full_cluster_is_full_and_still_serves_reads() -> None:
    """On a cluster of its own: the master goes on evicting for a moment."""
    keys, frame = make_keys(12), memoryview(bytearray(8 << 20))
    with MooncakeMaster() as master, joined_to(master, global_segment_size=64 << 20) as tier:
        with pytest.raises(TierFull, match="NO_AVAILABLE_HANDLE"):
            tier.write(keys, [frame] * 12)
        held = [result for result in read_frames(tier, keys, len(frame)) if not isinstance(result, Miss)]
        assert held
        assert set(held) == {bytes(frame)}
        tier.delete(keys)
        until(lambda: tier.write(keys[:1], [make_frame(1000)]))
        assert read_frames(tier, keys[:1]) == [bytes(make_frame(1000))]


# -- faults


def test_without_a_master(master: MooncakeMaster) -> None:
    url = f"mooncakestore://127.0.0.1:{free_port()}"
    with contextlib.closing(MooncakeTier(MooncakeOptions(url=url))) as tier:
        for call in (
            lambda: tier.contains(make_keys(1)),
            lambda: read_frames(tier, make_keys(1)),
            lambda: tier.write(make_keys(1), [make_frame(10)]),
            lambda: tier.delete(make_keys(1)),
        ):
            with pytest.raises(TierUnavailable, match="no Mooncake master"):
                call()
        with pytest.raises(TierUnavailable, match="master_http_port"):
            list(tier.scan())


def test_a_master_that_is_killed_and_comes_back_empty() -> None:
    keys = make_keys(2)
    with MooncakeMaster() as master, joined_to(master, timeout_seconds=2) as tier:
        tier.write(keys, [make_frame(100)] * 2)
        master.kill()
        for _ in range(3):
            with pytest.raises(TierUnavailable):
                tier.contains(keys)
        master.start()
        assert until(lambda: tier.contains(keys)) == [False, False]
        until(lambda: tier.write(keys, [make_frame(100, 1)] * 2))
        assert read_frames(tier, keys) == [bytes(make_frame(100, 1))] * 2


def test_the_library_is_not_asked_for_a_master_that_is_gone() -> None:
    """It would take 4 seconds, whatever the deadline."""
    keys = make_keys(1)
    with MooncakeMaster() as master, joined_to(master, global_segment_size=0, timeout_seconds=2) as tier:
        assert tier.contains(keys) == [False]
        library, tier._store._store = tier._store._store, None
        master.kill()
        tier._store._set_up = lambda: pytest.fail("the library was asked")
        for call in (tier.contains, tier.delete):
            with pytest.raises(TierUnavailable, match="no Mooncake master"):
                call(keys)
        tier._store._store = library
        master.start()
        assert until(lambda: tier.contains(keys)) == [False]


def until(call):
    """The result of ``call``, tried again while the library finds its way back; the test's own timeout ends it."""
    while True:
        try:
            return call()
        except (TierUnavailable, TierFull):
            time.sleep(0.05)


def test_a_master_that_hangs(master: MooncakeMaster, tier: MooncakeTier) -> None:
    keys = make_keys(2)
    tier.write(keys, [make_frame(100)] * 2)
    master.signal(signal.SIGSTOP)
    try:
        with pytest.raises(TierUnavailable, match="RPC_TIMEOUT"):
            tier.contains(keys)
    finally:
        master.signal(signal.SIGCONT)
    assert until(lambda: tier.contains(keys)) == [True, True]


def test_a_node_that_hangs_and_one_that_is_gone() -> None:
    """Its frames cannot be read, and the tier says so; what can be read is right."""
    keys, frames = make_keys(3), [make_frame(1 << 20, at) for at in range(3)]
    with MooncakeMaster() as master, MooncakeNode(master) as node:  # noqa: SIM117 - too long for a line
        with joined_to(master, global_segment_size=0) as tier:
            tier.write(keys, frames)
            node.signal(signal.SIGSTOP)
            with pytest.raises(TierUnavailable, match="TRANSFER_FAIL"):
                read_frames(tier, keys)
            with pytest.raises(TierUnavailable, match="TRANSFER_FAIL"):
                tier.write(make_keys(1, seed=1), frames[:1])
            node.signal(signal.SIGCONT)
            until(lambda: tier.write(keys, frames))
            # Connections that were cut in the middle cost a miss or two more.
            while read_frames(tier, keys) != [bytes(frame) for frame in frames]:
                time.sleep(0.05)
            node.signal(signal.SIGKILL)
            with pytest.raises(TierUnavailable, match="TRANSFER_FAIL"):
                read_frames(tier, keys)


def test_a_closed_tier_stays_closed(master: MooncakeMaster) -> None:
    with joined_to(master) as tier:
        assert len(tier.contains(make_keys(1))) == 1
    with pytest.raises(TierUnavailable, match="closed"):
        tier.contains(make_keys(1))


# -- settings


def test_the_url_takes_every_setting() -> None:
    url = "mooncakestore://store:50051/?device=mlx5_0,mlx5_1&protocol=rdma&replica_num=2&timeout_seconds=1.5"
    tier = open_tier(tier_from_url(url))
    assert tier.options.device_name == "mlx5_0,mlx5_1"
    assert (tier.options.protocol, tier.options.replica_num) == ("rdma", 2)
    assert tier.options.timeout_seconds == 1.5
    assert tier.describe() == "mooncakestore://store:50051"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mooncakestore://host", "expected mooncakestore://HOST:PORT"),
        ("mooncakestore://host:x", "expected mooncakestore://HOST:PORT"),
        ("mooncakestore://host:1/path", "expected mooncakestore://HOST:PORT"),
        ("mooncakestore://host:1?protocl=rdma", "unknown parameter 'protocl'; did you mean 'protocol'"),
        ("mooncakestore://host:1?replica_num=two", "replica_num"),
        ("mooncakestore://host:1?replica_num=0", "replica_num of the mooncakestore tier is 0"),
    ],
)
def test_a_wrong_url(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        open_tier(tier_from_url(url))


def test_commands_for_people(
    master: MooncakeMaster, tier: MooncakeTier, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = make_keys(3)
    tier.write(keys, [make_frame(100)] * 3)
    assert main(["keys", "list", "--tier", master.url]) == 0
    assert sorted(line.split("\t")[1] for line in capfd.readouterr().out.splitlines()) == sorted(keys)
    assert main(["keys", "show", keys[0], "--tier", master.url]) == 0
    assert "100" in capfd.readouterr().out
    assert main(["keys", "delete", keys[0], "--tier", master.url, "--yes"]) == 0
    assert tier.contains(keys) == [False, True, True]


_MISSING = """
import sys
sys.modules["mooncake"] = None
from kvstrata.cli import main
sys.exit(main(["keys", "list", "--tier", "mooncakestore://127.0.0.1:1"]))
"""


def test_a_missing_library_is_one_clear_line() -> None:
    done = subprocess.run([sys.executable, "-c", _MISSING], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("install it with: pip install 'kvstrata[mooncake]'\n")
    assert done.stderr.count("\n") == 1
