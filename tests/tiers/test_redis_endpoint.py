from __future__ import annotations

import pytest

from kvstrata.errors import ConfigError
from kvstrata.tiers.redis.endpoint import Endpoint, parse_url


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("redis://h", Endpoint(host="h")),
        ("redis://h:7000", Endpoint(host="h", port=7000)),
        ("redis://h:7000/3", Endpoint(host="h", port=7000, db=3)),
        ("redis://:p%40ss%2F@h/", Endpoint(host="h", password="p@ss/")),
        ("redis://user:p@h", Endpoint(host="h", username="user", password="p")),
        ("redis://h?username=user&password=p&db=4", Endpoint(host="h", username="user", password="p", db=4)),
        ("redis://[::1]:7000", Endpoint(host="::1", port=7000)),
        ("redis://", Endpoint(host="localhost")),
        ("rediss://h", Endpoint(host="h", tls=True)),
        (
            "rediss://h?ssl_ca_certs=/ca&ssl_certfile=/c&ssl_keyfile=/k&ssl_check_hostname=False",
            Endpoint(
                host="h", tls=True, ca_file="/ca", certificate_file="/c", key_file="/k", check_hostname=False
            ),
        ),
        ("unix:///run/redis.sock", Endpoint(socket_path="/run/redis.sock")),
        (
            "unix://:p@/run/My%20Redis.sock?db=1",
            Endpoint(socket_path="/run/My Redis.sock", password="p", db=1),
        ),
    ],
)
def test_urls(url: str, endpoint: Endpoint) -> None:
    assert parse_url(url) == endpoint


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("h:6379", "scheme"),
        ("http://:secret@h", "scheme"),
        ("redis://:secret@h:port", "wrong port"),
        ("redis://:sec/ret@h:99999", "wrong port"),
        ("redis://:secret@h:6379/zero", "database"),
        ("redis://:secret@h?dbb=1", "did you mean 'db'"),
        ("redis://:secret@h?zzzzzz=1", "unknown parameter"),
        ("redis://:secret@h?ssl_ca_certs=/x", "needs rediss"),
        ("rediss://:secret@h?ssl_check_hostname=maybe", "allowed are true, false"),
        ("rediss://:secret@h?ssl_cert_reqs=optional", "allowed are required, none"),
        ("unix://:secret@", "needs a path"),
    ],
)
def test_wrong_urls_are_named_without_secrets(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as raised:
        parse_url(url)
    assert "secret" not in str(raised.value)
    assert "sec/ret" not in str(raised.value)


def test_descriptions_have_no_secrets() -> None:
    for url in ("redis://u:secret@h:1/2", "rediss://:secret@[::1]", "unix://:secret@/s?db=3"):
        endpoint = parse_url(url)
        assert "secret" not in endpoint.describe() + repr(endpoint) + str(endpoint)
    assert parse_url("rediss://:secret@[::1]").describe() == "rediss://[::1]:6379/0"
    assert parse_url("redis://u:secret@h:1/2").describe() == "redis://h:1/2"
