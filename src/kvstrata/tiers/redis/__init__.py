"""The Redis tier."""

from kvstrata.tiers.redis.tier import RedisOptions, RedisTier

__all__ = ["RedisOptions", "RedisTier"]
