"""docs/upgrade.md: its commands run, and what it says of entries of before holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvstrata.errors import FrameError
from kvstrata.frame import FRAME_VERSION, FrameHeader
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import namespace
from kvstrata.testing.transcripts import Step, steps
from kvstrata.types import MissReason

GUIDE = Path(__file__).parents[2] / "docs" / "upgrade.md"


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(["maxmemory 64mb", "maxmemory-policy allkeys-lru"]) as server:
        yield server


@pytest.mark.parametrize("step", steps(GUIDE), ids=lambda step: step.command[:40])
def test_the_guide(step: Step, redis_server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "kvstrata.yaml").write_text("chunk_size: 256\nmax_local_cpu_size: 0.1\n")
    step.run(tmp_path, {"KVSTRATA_REMOTE_URL": redis_server.url})


def test_another_frame_version_is_a_miss() -> None:
    header = FrameHeader(0, 0, 1, 1, 1, 1, bytes(16), bytes(32), bytes(32), bytes(16), 0, "naive", "uint8")
    frame = bytearray(256)
    header.pack_into(memoryview(frame))
    frame[4:6] = (FRAME_VERSION + 1).to_bytes(2, "little")
    with pytest.raises(FrameError) as raised:
        FrameHeader.unpack(frame)
    assert raised.value.reason == MissReason.LAYOUT_MISMATCH


def test_another_chunk_size_or_element_type_has_other_keys() -> None:
    before = namespace()
    for change in ({"chunk_size": 2 * before.chunk_size}, {"kv_dtype": "fp8"}, {"world_size": 2}):
        assert msgspec.structs.replace(before, **change).fingerprint != before.fingerprint
