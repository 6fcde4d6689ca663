from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import ConfigError
from kvstrata.testing.tier import namespace
from kvstrata.tiers.s3.location import parse_url
from kvstrata.tiers.s3.names import name_key, object_name, scan_directory


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


def test_bucket_prefix_and_parameters() -> None:
    location = parse_url("s3://bucket/a/b/?endpoint=https://minio.local:9000/&region=eu-west-1")
    assert (location.bucket, location.prefix, location.region) == ("bucket", "a/b", "eu-west-1")
    assert (location.endpoint, location.addressing) == ("https://minio.local:9000", "path")
    assert not location.allow_http
    assert location.describe() == "s3://bucket/a/b at https://minio.local:9000"


def test_aws_is_the_default_and_never_plain_http() -> None:
    location = parse_url("s3://bucket")
    assert (location.prefix, location.endpoint, location.addressing) == ("", "", "virtual")
    assert not location.allow_http
    assert parse_url("s3://bucket.with.dots").addressing == "path"


def test_plain_http_only_where_it_is_said() -> None:
    assert parse_url("s3://bucket?endpoint=http://h:1").allow_http
    assert not parse_url("s3://bucket?endpoint=https://h:1").allow_http


def test_the_bucket_in_the_name_of_the_host() -> None:
    location = parse_url("s3://bucket?endpoint=https://s3.example.com:8443&addressing=virtual")
    assert location.request_endpoint == "https://bucket.s3.example.com:8443"


def test_the_environment_fills_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h:9000")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    location = parse_url("s3://bucket")
    assert (location.endpoint, location.region) == ("http://h:9000", "eu-north-1")
    assert parse_url("s3://bucket?endpoint=https://h").endpoint == "https://h"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://AKIAKEY:geheim@bucket/p", "credentials in the URL are refused"),
        ("s3://geheim@bucket", "credentials in the URL are refused"),
        ("s3://bucket?endpoint=https://u:geheim@h", "endpoint is"),
        ("s3://bucket?endpoint=ftp://h", "endpoint is"),
        ("s3://bucket?endpoint=h:9000", "endpoint is"),
        ("s3://", "no bucket"),
        ("s3://bu cket", "no bucket"),
        ("s3://bucket/a//b", "prefix"),
        ("s3://bucket/../x", "prefix"),
        ("s3://bucket?regoin=x", "did you mean 'region'"),
        ("s3://bucket?secret_access_key=geheim", "unknown parameter"),
        ("s3://bucket?addressing=dns", "path, virtual"),
        ("s3://[", "cannot be read"),
    ],
)
def test_urls_that_are_refused(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        parse_url(url)
    assert "geheim" not in str(raised.value)
    assert "AKIAKEY" not in str(raised.value)


@given(
    model=st.text(min_size=1, max_size=300),
    worker=st.integers(0, 10**6),
    digest=st.binary(min_size=32, max_size=32),
)
def test_keys_and_names_are_one_to_one(model: str, worker: int, digest: bytes) -> None:
    try:
        key = namespace(model).key(digest, worker)
    except UnicodeEncodeError:
        return  # lone surrogates are no model names
    name = object_name(key)
    assert name_key(name) == key
    assert name.isascii()
    assert not set("%+~ \\?#&") & set(name)
    assert all(part not in ("", ".", "..") and len(part) <= 200 for part in name.split("/"))
    head = namespace(model).key_prefix
    assert name.startswith(scan_directory(head) + "/")


@given(st.text(max_size=60), st.text(max_size=60))
def test_other_keys_have_other_names(one: str, other: str) -> None:
    assert (object_name(one) == object_name(other)) == (one == other)


@given(st.text(max_size=100))
def test_any_name_is_taken_apart_without_a_crash(name: str) -> None:
    key = name_key(name)
    assert key is None or object_name(key) == name
