from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.config import mask, mask_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:6379", "redis://h:6379"),
        ("redis://:pw@h:6379/0", "redis://:***@h:6379/0"),
        ("redis://user:pw@h:6379", "redis://user:***@h:6379"),
        ("rediss://:p@ss/w:rd@h", "rediss://:***@h"),
        ("redis://:p w@h", "redis://:***@h"),
        ("redis://pw@h", "redis://***@h"),
        ("redis-sentinel://:a@h1:1,:b@h2:2", "redis-sentinel://:***@h2:2"),
        ("redis://h:6379/0?sentinel_password=p@ss", "redis://***"),
        ("redis://h?password=pw&db=1", "redis://h?password=***&db=1"),
        (
            "s3://b?aws_secret_access_key=x&session_token=y",
            "s3://b?aws_secret_access_key=***&session_token=***",
        ),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("/var/cache/kv@home", "/var/cache/kv@home"),
        ("", ""),
    ],
)
def test_mask_url(url: str, shown: str) -> None:
    assert mask_url(url) == shown
    assert mask_url(shown) == shown


def test_mask_looks_into_mappings_and_lists() -> None:
    tiers = [{"url": "redis://:pw@h", "password": "pw", "options": {"api_key": "pw", "name": "near"}}]
    shown = [{"url": "redis://:***@h", "password": "***", "options": {"api_key": "***", "name": "near"}}]
    assert mask(tiers) == shown
    assert mask("pw", "password") == "***"
    assert mask(None, "password") is None
    assert mask("lru", "cache_policy") == "lru"
    assert mask(5, "chunk_size") == 5


secrets = st.text(st.characters(min_codepoint=33, max_codepoint=1000), min_size=1).map(lambda s: "geheim" + s)


@given(secrets, st.sampled_from(["redis", "rediss", "redis-sentinel", "s3"]), st.sampled_from(["", "user"]))
def test_no_password_shows_whatever_is_in_it(password: str, scheme: str, user: str) -> None:
    assert "geheim" not in mask_url(f"{scheme}://{user}:{password}@host:6379/0")
