from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.testing.tier import TierContract
from kvstrata.tiers.base import Tier
from kvstrata.tiers.file import FileOptions, FileTier


def open_tier(path: Path, max_bytes: int = 200_000_000, **options: object) -> FileTier:
    return FileTier(FileOptions(path=str(path), max_bytes=max_bytes, **options))


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
