"""The S3 tier."""

from kvstrata.tiers.s3.tier import S3Options, S3Tier

__all__ = ["S3Options", "S3Tier"]
