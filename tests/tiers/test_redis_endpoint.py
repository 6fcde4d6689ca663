from __future__ import annotations

import pytest

from kvstrata.config import Settings, tier_configs
from kvstrata.config.values import url_kind
from kvstrata.errors import ConfigError
from kvstrata.tiers.redis.endpoint import Endpoint
from kvstrata.tiers.redis.url import SCHEMES, parse_url


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
        ("valkey://h:7000/1", Endpoint(host="h", port=7000, db=1)),
        ("valkeys://h", Endpoint(host="h", tls=True)),
        ("REDIS://h?ssl=true&ssl_ca_certs=/ca", Endpoint(host="h", tls=True, ca_file="/ca")),
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
    assert parse_url(url).data == endpoint


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("h:6379", "scheme"),
        ("http://:secret@h", "scheme"),
        ("redis://:secret@h:port", "wrong port"),
        ("redis://:sec/ret@h:99999", "wrong port"),
        ("redis://:12#secret@h:6379", "percent encoding"),
        ("redis://u:12#secret@h", "percent encoding"),
        ("redis://u:12?secret=1@h:6379", "percent encoding"),
        ("redis://:secret@h:6379/zero", "database"),
        ("redis://:secret@h?dbb=1", "did you mean 'db'"),
        ("redis://:secret@h?zzzzzz=1", "unknown parameter"),
        ("redis://:secret@h?ssl_ca_certs=/x", "needs rediss"),
        ("redis://:secret@a,b,a:6379", "named twice"),
        ("redis://:secret@a,:secret@b", "one login"),
        ("redis://:secret@a:1,b:port", "wrong port"),
        ("redis://:secret@h?read_from=replica", "needs redis-sentinel"),
        ("redis-sentinel://:secret@h?read_from=anyone", "allowed are master, replica"),
        ("redis-cluster://:secret@h/1", "database 0 only"),
        ("unix://:secret@/s?ssl=true", "needs rediss"),
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
        endpoint = parse_url(url).data
        assert "secret" not in endpoint.describe() + repr(endpoint) + str(endpoint)
    assert parse_url("rediss://:secret@[::1]").describe() == "rediss://[::1]:6379/0"
    assert parse_url("redis://u:secret@h:1/2").describe() == "redis://h:1/2"


def test_several_servers_are_a_ring_with_one_login() -> None:
    ring = parse_url("rediss://u:p@a:1,b,[::1]:3/2?ssl_cert_reqs=none")
    assert ring.kind == "ring"
    assert [(e.host, e.port) for e in ring.endpoints] == [("a", 1), ("b", 6379), ("::1", 3)]
    assert {(e.username, e.password, e.db, e.tls, e.verify) for e in ring.endpoints} == {
        ("u", "p", 2, True, False)
    }
    assert ring.describe() == "rediss://a:1,b:6379,[::1]:3/2"


def test_a_sentinel_service_has_two_logins() -> None:
    found = parse_url(
        "redis-sentinel://u:secret@a,b:1/my%20service?db=3&sentinel_password=hidden&read_from=replica"
    )
    assert (found.kind, found.service, found.read_from) == ("sentinel", "my service", "replica")
    assert [(e.host, e.port, e.password, e.db) for e in found.endpoints] == [
        ("a", 26379, "hidden", 0),
        ("b", 1, "hidden", 0),
    ]
    assert (found.data.username, found.data.password, found.data.db) == ("u", "secret", 3)
    assert found.describe() == "redis-sentinel://a:26379,b:1/my service?db=3"
    assert "secret" not in repr(found)
    assert "hidden" not in repr(found)
    assert parse_url("redis-sentinel://a:1,b:2,c:3").service == "mymaster"


def test_clusters() -> None:
    assert parse_url("redis-cluster://a,b:7000").kind == "cluster"
    for url in ("rediss-cluster://a", "redis-cluster://a?ssl=true", "valkeys-cluster://a"):
        assert parse_url(url).data.tls
        assert parse_url(url).describe() == "rediss-cluster://a:6379"


def test_every_scheme_leads_here() -> None:
    assert {url_kind(f"{scheme}://h") for scheme in (*SCHEMES, "unix")} == {"redis"}


def test_urls_are_checked_with_the_configuration() -> None:
    settings = Settings(remote_url="redis://:secret@h:notaport")
    with pytest.raises(ConfigError, match="wrong port") as raised:
        tier_configs(settings)
    assert "secret" not in str(raised.value)
