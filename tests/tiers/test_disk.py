from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.testing.tier import TierContract
from kvstrata.tiers.base import Tier
from kvstrata.tiers.disk import DiskOptions, DiskTier


def open_tier(path: Path, max_bytes: int = 100_000_000) -> DiskTier:
    return DiskTier(DiskOptions(path=str(path), max_bytes=max_bytes))


class TestDiskTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with contextlib.closing(open_tier(tmp_path / "kv")) as tier:
            yield tier
