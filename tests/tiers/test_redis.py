from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.tier import TierContract
from kvstrata.tiers.base import Tier
from kvstrata.tiers.redis import RedisOptions, RedisTier


def open_tier(url: str, **options: object) -> RedisTier:
    return RedisTier(RedisOptions(url=url, **options))


def empty(tier: RedisTier) -> RedisTier:
    tier.delete(list(tier.scan()))
    return tier


class TestRedisTier(TierContract):
    @pytest.fixture
    def tier(self, redis_server: RedisServer) -> Iterator[Tier]:
        with contextlib.closing(open_tier(redis_server.url)) as tier:
            yield empty(tier)
