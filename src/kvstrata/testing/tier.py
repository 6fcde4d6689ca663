"""The tier contract as tests: subclass :class:`TierContract`, give it a tier, and run pytest.

class TestMyTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path):
        with contextlib.closing(MyTier(MyOptions(path=str(tmp_path)))) as tier:
            yield tier
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstrata.errors import TierFull
from kvstrata.tiers.base import Tier
from kvstrata.types import KVLayout, Miss, MissReason, Namespace

SIZES = (0, 1, 255, 256, 257, 4095, 4096, 4097, 65_536, 1_000_003)
"""Frame sizes around what buffers, pages and headers are made of."""
ODD_MODEL_NAMES = (
    "org/model",
    "org/model-v2",
    "/models/local path/with blanks",
    "a@b@1@0",
    "stars*and[brackets]?and\\slashes",
    "..",
    "../../etc/passwd",
    "percent%40%2Fsign",
    "größer/模型",
    "x" * 300,
    "line\nbreak\tand\0zero",
)
"""Model names that a tier may trip over when it makes names of its own from keys."""


def namespace(model_name: str = "org/model", world_size: int = 1) -> Namespace:
    """A namespace for test keys."""
    layout = KVLayout(block_size=16, page_bytes=(4096,), dtype="bfloat16", kernel_format="test")
    return Namespace("vllm", model_name, "ab", "auto", world_size, f"tp{world_size}pp1", 256, layout)


def make_keys(count: int, model_name: str = "org/model", *, seed: int = 0, world_size: int = 1) -> list[str]:
    """Keys of different chunks of one model."""
    rng = random.Random(f"{seed} {model_name}")  # noqa: S311 - test data
    space = namespace(model_name, world_size)
    return [space.key(rng.randbytes(32), index % world_size) for index in range(count)]


def make_frame(size: int, seed: int = 0) -> memoryview:
    """``size`` bytes that differ by ``seed``."""
    return memoryview(bytearray(random.Random(seed).randbytes(size)))  # noqa: S311 - test data


def read_frames(tier: Tier, keys: Sequence[str], room: int = 2_000_000) -> list[bytes | Miss]:
    """Read ``keys`` with buffers of ``room`` bytes; the frames or the misses."""
    buffers = [memoryview(bytearray(room)) for _ in keys]
    results = tier.read(keys, buffers)
    assert len(results) == len(keys)
    return [
        result if isinstance(result, Miss) else bytes(buffer[:result])
        for result, buffer in zip(results, buffers, strict=True)
    ]


def check_a_key_too_long_for_a_path(tier: Tier) -> None:
    """An empty ``tier`` whose keys are paths refuses it, without loss for what is written with it."""
    long, short = make_keys(1, "模" * 300), make_keys(1)
    assert tier.contains(long) == [False]
    assert read_frames(tier, long) == [Miss(MissReason.ABSENT)]
    with pytest.raises(TierFull, match="too long for a path"):
        tier.write([*short, *long], [make_frame(10)] * 2)
    assert list(tier.scan()) == short
    assert tier.delete([*long, *short]) == 1


class TierContract:
    """What every tier must do. The fixture ``tier`` gives an empty one with room for 100 MB."""

    @pytest.fixture
    def tier(self) -> Tier:
        raise NotImplementedError("a subclass gives the fixture `tier`")

    def test_frames_of_all_sizes_come_back_as_written(self, tier: Tier) -> None:
        keys = make_keys(len(SIZES))
        frames = [make_frame(size, seed) for seed, size in enumerate(SIZES)]
        tier.write(keys, frames)
        assert tier.contains(keys) == [True] * len(keys)
        assert read_frames(tier, keys) == [bytes(frame) for frame in frames]

    def test_a_buffer_of_exactly_the_size_is_enough(self, tier: Tier) -> None:
        keys = make_keys(len(SIZES))
        frames = [make_frame(size, seed) for seed, size in enumerate(SIZES)]
        tier.write(keys, frames)
        buffers = [memoryview(bytearray(size)) for size in SIZES]
        assert tier.read(keys, buffers) == list(SIZES)
        assert buffers == frames

    def test_reads_stay_inside_the_frame(self, tier: Tier) -> None:
        keys, size = make_keys(3), 70_000
        tier.write(keys, [make_frame(size, seed) for seed in range(3)])
        whole = memoryview(bytearray(b"\xaa" * 4 * size))
        buffers = [whole[at * size : (at + 1) * size] for at in (0, 1, 2)]
        assert tier.read(keys, buffers) == [size] * 3
        assert bytes(whole[3 * size :]) == b"\xaa" * size
        assert buffers == [make_frame(size, seed) for seed in range(3)]

    def test_empty_batches(self, tier: Tier) -> None:
        tier.write([], [])
        assert tier.contains([]) == []
        assert tier.read([], []) == []
        assert tier.delete([]) == 0

    def test_missing_keys_are_values(self, tier: Tier) -> None:
        keys = make_keys(3)
        assert tier.contains(keys) == [False] * 3
        assert all(isinstance(result, Miss) for result in read_frames(tier, keys))
        assert tier.delete(keys) == 0

    def test_results_keep_their_positions(self, tier: Tier) -> None:
        keys = make_keys(20)
        held = keys[1::3]
        tier.write(held, [make_frame(1000 + at, at) for at in range(len(held))])
        assert tier.contains(keys) == [key in held for key in keys]
        for key, result in zip(keys, read_frames(tier, keys), strict=True):
            if key in held:
                at = held.index(key)
                assert result == bytes(make_frame(1000 + at, at))
            else:
                assert isinstance(result, Miss)

    def test_a_key_may_come_twice_in_a_batch(self, tier: Tier) -> None:
        (key,) = make_keys(1)
        tier.write([key], [make_frame(5000)])
        assert tier.contains([key, key]) == [True, True]
        assert read_frames(tier, [key, key]) == [bytes(make_frame(5000))] * 2

    def test_overwriting_replaces(self, tier: Tier) -> None:
        (key,) = make_keys(1)
        for size in (5000, 100, 9000):
            tier.write([key], [make_frame(size, size)])
            assert read_frames(tier, [key]) == [bytes(make_frame(size, size))]
        assert sorted(tier.scan()) == [key]

    def test_a_frame_larger_than_its_buffer_is_a_corrupt_miss(self, tier: Tier) -> None:
        keys = make_keys(3)
        tier.write(keys, [make_frame(300_000, seed) for seed in range(3)])
        buffers = [memoryview(bytearray(size)) for size in (300_000, 299_999, 300_000)]
        first, second, third = tier.read(keys, buffers)
        assert (first, third) == (300_000, 300_000)
        assert isinstance(second, Miss)
        assert second.reason == MissReason.CORRUPT
        assert (buffers[0], buffers[2]) == (make_frame(300_000, 0), make_frame(300_000, 2))
        assert read_frames(tier, keys[1:2]) == [bytes(make_frame(300_000, 1))]

    def test_frames_may_change_after_write(self, tier: Tier) -> None:
        (key,) = make_keys(1)
        frame = make_frame(100_000)
        tier.write([key], [frame])
        frame[:] = bytes(100_000)
        assert read_frames(tier, [key]) == [bytes(make_frame(100_000))]

    def test_read_only_frames_can_be_written(self, tier: Tier) -> None:
        (key,) = make_keys(1)
        tier.write([key], [make_frame(1000).toreadonly()])
        assert read_frames(tier, [key]) == [bytes(make_frame(1000))]

    def test_delete_drops_and_counts(self, tier: Tier) -> None:
        keys = make_keys(4)
        tier.write(keys, [make_frame(100)] * 4)
        assert tier.delete([*keys[:2], *make_keys(1, seed=9)]) == 2
        assert tier.contains(keys) == [False, False, True, True]
        assert sorted(tier.scan()) == sorted(keys[2:])

    @pytest.mark.parametrize("model_name", ODD_MODEL_NAMES, ids=range(len(ODD_MODEL_NAMES)))
    def test_odd_model_names(self, tier: Tier, model_name: str) -> None:
        keys = make_keys(2, model_name)
        others = make_keys(2, "another")
        tier.write([*keys, *others], [make_frame(100, seed) for seed in range(4)])
        assert sorted(tier.scan(namespace(model_name).key_prefix)) == sorted(keys)
        assert sorted(tier.scan()) == sorted([*keys, *others])
        assert read_frames(tier, keys) == [bytes(make_frame(100, seed)) for seed in range(2)]
        assert tier.delete(keys) == 2
        assert sorted(tier.scan()) == sorted(others)

    def test_scan_by_any_prefix(self, tier: Tier) -> None:
        keys = [*make_keys(3, "org/a"), *make_keys(3, "org/ab", world_size=2), *make_keys(2, "org/a*")]
        tier.write(keys, [make_frame(10)] * len(keys))
        prefixes = (
            "",
            "v",
            "vllm@org/a",
            "vllm@org/a@",
            "vllm@org/a*",
            "vllm@org/ab@2@1",
            keys[0][:-5],
            keys[0],
        )
        for prefix in (*prefixes, "zzz", "?", "*", "[v]", keys[0] + "0"):
            assert sorted(tier.scan(prefix)) == sorted(key for key in keys if key.startswith(prefix))

    def test_scan_of_many_while_deleting(self, tier: Tier) -> None:
        keys = make_keys(500)
        tier.write(keys, [make_frame(10)] * 500)
        seen = [key for key in tier.scan() if tier.delete([key]) == 1]
        assert sorted(seen) == sorted(keys)
        assert list(tier.scan()) == []

    def test_large_batches(self, tier: Tier) -> None:
        keys = make_keys(3000)
        tier.write(keys[::2], [make_frame(300, at) for at in range(1500)])
        assert tier.contains(keys) == [True, False] * 1500
        results = read_frames(tier, keys, room=300)
        assert results[::2] == [bytes(make_frame(300, at)) for at in range(1500)]
        assert all(isinstance(result, Miss) for result in results[1::2])

    def test_a_read_is_never_a_mix(self, tier: Tier) -> None:
        """Four threads write frames of one byte value and other sizes over each other, and read them."""
        keys = make_keys(4)
        failures: list[str] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)  # noqa: S311 - test data
            buffer = memoryview(bytearray(200_000))
            for _ in range(40):
                key, value = rng.choice(keys), rng.randrange(1, 200)
                match rng.randrange(5):
                    case 0 | 1:
                        tier.write([key], [memoryview(bytes([value]) * (1000 * value))])
                    case 2 | 3:
                        (result,) = tier.read([key], [buffer])
                        if (
                            isinstance(result, int)
                            and bytes(buffer[:result]) != bytes([result // 1000]) * result
                        ):
                            failures.append(f"{result} bytes of {set(buffer[:result])}")
                    case _:
                        tier.delete([key])

        with ThreadPoolExecutor(4) as threads:
            for future in [threads.submit(work, seed) for seed in range(4)]:
                future.result()
        assert failures == []

    def test_concurrent_batches_do_not_meet(self, tier: Tier) -> None:
        barrier = threading.Barrier(4)

        def work(seed: int) -> bool:
            keys = make_keys(20, seed=seed)
            frames = [make_frame(20_000 + seed, 100 * seed + at) for at in range(20)]
            barrier.wait()
            tier.write(keys, frames)
            whole = read_frames(tier, keys, room=30_000) == [bytes(frame) for frame in frames]
            return whole and tier.contains(keys) == [True] * 20

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(work, range(4))) == [True] * 4

    def test_stats(self, tier: Tier) -> None:
        keys = make_keys(3)
        tier.write(keys, [make_frame(10_000, seed) for seed in range(3)])
        stats = tier.stats()
        assert stats.entries in (None, 3)
        assert stats.used_bytes is None or stats.used_bytes >= 30_000
        assert stats.budget_bytes is None or stats.budget_bytes >= (stats.used_bytes or 0)

    def test_close_is_idempotent(self, tier: Tier) -> None:
        assert tier.kind
        assert tier.describe()
        tier.close()
        tier.close()
