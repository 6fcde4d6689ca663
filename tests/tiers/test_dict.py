from __future__ import annotations

import pytest

from kvstrata.testing.tier import TierContract
from kvstrata.tiers.base import Tier
from kvstrata.tiers.dict import DictTier


class TestDictTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return DictTier()
