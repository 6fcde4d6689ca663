"""What a value may be, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstrata.config import SETTINGS, load_settings
from kvstrata.errors import ConfigError

WRONG: list[tuple[str, Any, str]] = [
    ("chunk_size", "abc", "expected an integer (tokens), at least 1"),
    ("chunk_size", 0, "at least 1"),
    ("chunk_size", -16, "at least 1"),
    ("chunk_size", 256.5, "an integer"),
    ("chunk_size", True, "an integer"),
    ("chunk_size", None, "an integer"),
    ("chunk_size", [256], "an integer"),
    ("chunk_size", 2**40, "at most"),
    ("local_cpu", "maybe", "expected true or false"),
    ("local_cpu", 2, "expected true or false"),
    ("local_cpu", 1.0, "expected true or false"),
    ("local_cpu", None, "expected true or false"),
    ("max_local_cpu_size", "5GB", "a number (GiB)"),
    ("max_local_cpu_size", 0, "more than 0"),
    ("max_local_cpu_size", "inf", "a number"),
    ("max_local_cpu_size", "nan", "a number"),
    ("max_local_cpu_size", float("inf"), "a number"),
    ("max_local_disk_size", -1, "at least 0"),
    ("cache_policy", "ARC", "there is lru, s3fifo"),
    ("cache_policy", 5, "a string"),
    ("remote_serde", "zstandard", "(did you mean 'zstd'?); there is aesgcm"),
    ("remote_serde", "aesgcm+zstd", "quantises first, then compresses, then encrypts"),
    ("remote_serde", "naive+aesgcm", "stands alone"),
    ("remote_serde", "zstd:20", "level '20': expected an integer from 1 to 19"),
    ("remote_serde", "zstd:high", "level 'high': expected an integer"),
    ("remote_serde", "cachegen:best", "level 'best': expected high, low, medium"),
    ("remote_serde", "zstd:3,level=4", "two values for level"),
    ("remote_serde", "int4+floats+aesgcm", "18 characters of 16 at most: leave one codec out"),
    ("remote_serde", "zstd:speed=3", "has no option 'speed'; it has level"),
    ("remote_serde", "zstd:3,4", "has no option '4'; it has level"),
    ("remote_serde", "zstd:", "expected zstd:VALUE"),
    ("remote_serde", "aesgcm:key_file=/etc/key", "expected aesgcm:VALUE"),
    ("remote_url", "memcached://h:1", "this version has tiers for"),
    ("remote_url", "ftp://h:1,h:2", "this version has tiers for"),
    ("remote_url", "gopher://h:1", "redis://"),
    ("remote_url", "h:6379", "this version has tiers for"),
    ("remote_url", 6379, "a string"),
    ("local_disk", "s3://bucket", "a path or a file:// URL"),
    ("local_disk", "file://", "a path or a file:// URL"),
    ("local_disk", "/a,/b", "for several use the key 'tiers'"),
    ("local_disk", "file:///a,file:///b", "for several use the key 'tiers'"),
    ("ttl_seconds", 0, "at least 1"),
    ("ttl_seconds", "1h", "an integer (s)"),
    ("server_url", "127.0.0.1:5555", "tcp://HOST:PORT"),
    ("server_url", "tcp://h", "tcp://HOST:PORT"),
    ("server_url", "tcp://h:99999", "tcp://HOST:PORT"),
    ("server_url", "http://h:1", "tcp://HOST:PORT"),
    ("server_url", "ipc://", "ipc://PATH"),
    ("port", 65536, "at most 65,535"),
    ("http_port", "http", "an integer"),
    ("log_level", "LOUD", "DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ("tiers", "redis://h", "a list of mappings"),
    ("tiers", {"kind": "redis"}, "a list of mappings"),
    ("tiers", [1], "a list of mappings"),
]

WRONG_AS_TEXT = [
    (key, value, allowed)
    for key, value, allowed in WRONG
    if isinstance(value, str) or (type(value) is int and SETTINGS[key].base is not str)
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG)
def test_a_wrong_value_names_key_value_source_and_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({}, extra_config={key: value})
    message = str(caught.value)
    assert message.startswith(f"{key} = {value!r} (from kv_connector_extra_config '{key}') is not allowed: ")
    assert allowed in message


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG_AS_TEXT)
def test_the_same_as_text_from_the_environment(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"from environment variable KVSTRATA_{key.upper()}") as caught:
        load_settings({f"KVSTRATA_{key.upper()}": str(value)})
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [(t, True) for t in ("true", "True", "TRUE", "1", "yes", "on", " on ")]
    + [(f, False) for f in ("false", "False", "0", "no", "off", "OFF")],
)
def test_booleans(text: str, value: bool) -> None:
    assert load_settings({"LMCACHE_LOCAL_CPU": text}).settings.local_cpu is value
    assert load_settings({}, extra_config={"local_cpu": text}).settings.local_cpu is value


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("cache_policy", "lru", "LRU"),
        ("cache_policy", "s3fifo", "S3FIFO"),
        ("remote_serde", "NAIVE", "naive"),
        ("remote_serde", "Zstd:3+AESGCM", "zstd:3+aesgcm"),
        ("remote_serde", "zstd:level=3", "zstd:level=3"),
        ("log_level", "warn", "WARNING"),
        ("log_level", "debug", "DEBUG"),
        ("local_disk", "file:///mnt/x/", "/mnt/x"),
        ("local_disk", "file://localhost/mnt/x", "/mnt/x"),
        ("local_disk", "file:///mnt/a%20b", "/mnt/a b"),
        ("local_disk", "relative", str(Path("relative").absolute())),
        ("local_disk", "file://relative/", str(Path("relative").absolute())),
        ("local_disk", "~/kv", str(Path("~/kv").expanduser())),
        ("remote_url", "None", None),
        ("remote_url", "null", None),
        ("ttl_seconds", "none", None),
        ("http_port", "None", None),
        ("server_url", "tcp://[::1]:5555/", "tcp://[::1]:5555"),
        ("max_local_cpu_size", "20", 20.0),
        ("max_local_cpu_size", "1e-3", 0.001),
    ],
)
def test_spellings(key: str, text: str, value: Any) -> None:
    assert getattr(load_settings({f"KVSTRATA_{key.upper()}": text}).settings, key) == value


def test_sizes_in_bytes() -> None:
    settings = load_settings({}, overrides={"max_local_cpu_size": 0.5, "max_local_disk_size": 2}).settings
    assert (settings.max_local_cpu_bytes, settings.max_local_disk_bytes) == (2**29, 2**31)


def test_the_disk_tier_needs_a_budget() -> None:
    assert load_settings({"LMCACHE_MAX_LOCAL_DISK_SIZE": "0"}).settings.max_local_disk_size == 0
    with pytest.raises(ConfigError, match="max_local_disk_size = 0 is not allowed together with local_disk"):
        load_settings({"LMCACHE_MAX_LOCAL_DISK_SIZE": "0", "LMCACHE_LOCAL_DISK": "/x"})


def test_a_secret_in_a_wrong_value_is_masked() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"LMCACHE_REMOTE_URL": "rediz://user:geheim@h:1"})
    assert "geheim" not in str(caught.value)
    assert "rediz://user:***@h:1" in str(caught.value)


@given(
    st.sampled_from(sorted(SETTINGS)),
    st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans()),
)
@example("local_disk", "~nobody-of-that-name/kv")
def test_any_value_is_taken_or_refused_with_a_message(key: str, value: Any) -> None:
    try:
        settings = load_settings({}, extra_config={key: value}).settings
    except ConfigError as error:
        message = str(error)
    else:
        message = key
        assert type(getattr(settings, key)) in (SETTINGS[key].base, type(None))
    assert key in message
