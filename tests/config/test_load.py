"""Sources and their precedence, aliases, unknown keys, notices."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.config import ALIASES, DEFAULT, SETTINGS, Settings, load_settings, tier_configs
from kvstrata.config.lmcache import LMCACHE_KEYS
from kvstrata.errors import ConfigError

SOURCES = ("lmcache", "kvstrata", "file", "extra", "argument")
VALID: dict[str, Any] = {
    "chunk_size": 64,
    "save_unfull_chunk": False,
    "save_decode_cache": True,
    "min_retrieve_tokens": 7,
    "gate": "never",
    "read_policy": "fastest",
    "isolation": "salt",
    "lookup_timeout_ms": 10,
    "local_cpu": False,
    "max_local_cpu_size": 1.5,
    "cache_policy": "S3FIFO",
    "shm_dir": "/dev/shm",
    "local_disk": "/var/cache/kv",
    "max_local_disk_size": 3.0,
    "remote_url": "redis://h:1",
    "remote_serde": "naive",
    "encryption_key_file": "/etc/kvstrata/keys",
    "require_encryption": True,
    "ttl_seconds": 60,
    "quotas": ({"name": "acme", "salt": "x", "tiers": {"l1": {"reserved_bytes": 0, "limit_bytes": 5}}},),
    "tiers": ({"kind": "disk", "path": "/x", "max_bytes": 1000},),
    "blocking_timeout_secs": 2.5,
    "num_workers": 2,
    "write_queue_bytes": 1000,
    "breaker_failures": 9,
    "breaker_reset_seconds": 0.5,
    "runtime_dir": "/run/kv",
    "server_url": "tcp://10.0.0.1:5555",
    "rpc_timeout_ms": 50,
    "host": "0.0.0.0",
    "port": 6000,
    "http_host": "::1",
    "http_open_reads": True,
    "http_dashboard": False,
    "http_token_file": "/run/token",
    "http_port": 0,
    "tracing": True,
    "log_level": "DEBUG",
}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def as_variable(value: Any) -> str:
    return json.dumps(value) if isinstance(value, tuple) else str(value)


def test_without_sources_everything_is_default() -> None:
    resolved = load_settings({})
    assert resolved.settings == Settings()
    assert set(resolved.sources.values()) == {DEFAULT}
    assert resolved.notices == ()
    assert tier_configs(resolved.settings) == []


def test_defaults_pass_their_own_bounds() -> None:
    values = {key: setting.default for key, setting in SETTINGS.items()}
    assert load_settings({}, overrides=values).settings == Settings()


@pytest.mark.parametrize("given_by", [c for n in range(6) for c in itertools.combinations(SOURCES, n)])
def test_the_highest_source_wins(given_by: tuple[str, ...], tmp_path: Path) -> None:
    value = {source: 100 + index for index, source in enumerate(SOURCES)}
    environ = {}
    if "lmcache" in given_by:
        environ["LMCACHE_CHUNK_SIZE"] = str(value["lmcache"])
    if "kvstrata" in given_by:
        environ["KVSTRATA_CHUNK_SIZE"] = str(value["kvstrata"])
    if "file" in given_by:
        environ["KVSTRATA_CONFIG_FILE"] = str(written(tmp_path / "c.yaml", {"chunk_size": value["file"]}))
    extra = {"chunk_size": value["extra"]} if "extra" in given_by else None
    overrides = {"chunk_size": value["argument"]} if "argument" in given_by else None
    resolved = load_settings(environ, extra_config=extra, overrides=overrides)
    assert resolved.settings.chunk_size == (value[given_by[-1]] if given_by else 256)
    names = {
        "lmcache": "environment variable LMCACHE_CHUNK_SIZE",
        "kvstrata": "environment variable KVSTRATA_CHUNK_SIZE",
        "file": f"file {tmp_path / 'c.yaml'}",
        "extra": "kv_connector_extra_config 'chunk_size'",
        "argument": "argument",
    }
    assert resolved.sources["chunk_size"] == (names[given_by[-1]] if given_by else DEFAULT)
    said = [notice for notice in resolved.notices if "LMCACHE_CHUNK_SIZE" in notice]
    assert len(said) == ({"lmcache", "kvstrata"} <= set(given_by))


def test_sources_decide_key_by_key(tmp_path: Path) -> None:
    file = written(tmp_path / "c.yaml", {"chunk_size": 16, "local_cpu": False})
    resolved = load_settings(
        {"KVSTRATA_PORT": "1", "KVSTRATA_CHUNK_SIZE": "8"},
        file=file,
        overrides={"local_cpu": None, "gate": "never"},
    )
    settings = resolved.settings
    assert (settings.chunk_size, settings.local_cpu, settings.port, settings.gate) == (16, False, 1, "never")


@pytest.mark.parametrize("key", SETTINGS)
def test_every_key_from_every_source(key: str, tmp_path: Path) -> None:
    value = VALID[key]
    plain = list(value) if isinstance(value, tuple) else value
    assert value != SETTINGS[key].default or key == "remote_serde"
    results = [
        load_settings({f"KVSTRATA_{key.upper()}": as_variable(value)}),
        load_settings({}, file=written(tmp_path / "c.yaml", {key: plain})),
        load_settings({}, file=written(tmp_path / "t.yaml", {key: as_variable(value)})),
        load_settings({}, extra_config={key: plain}),
        load_settings({}, extra_config={f"kvstrata.{key}": plain}),
        load_settings({}, overrides={key: plain}),
    ]
    for resolved in results:
        assert getattr(resolved.settings, key) == value
        assert [name for name, source in resolved.sources.items() if source != DEFAULT] == [key]


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_every_alias(alias: str, key: str, tmp_path: Path) -> None:
    value = VALID[key]
    for resolved in (
        load_settings({f"KVSTRATA_{alias.upper()}": str(value)}),
        load_settings({f"LMCACHE_{alias.upper()}": str(value)}),
        load_settings({}, file=written(tmp_path / "c.yaml", {alias: value})),
        load_settings({}, extra_config={f"lmcache.{alias}": value}),
        load_settings({}, overrides={alias: value}),
    ):
        assert getattr(resolved.settings, key) == value


def test_key_and_alias_in_one_source_must_agree(tmp_path: Path) -> None:
    agreeing = {"local_disk": "/a", "local_storage": "file:///a"}
    assert load_settings({}, file=written(tmp_path / "a", agreeing)).settings.local_disk == "/a"
    with pytest.raises(ConfigError, match="local_disk is given twice with different values"):
        load_settings({}, file=written(tmp_path / "b", {"local_disk": "/a", "local_storage": "/b"}))


@pytest.mark.parametrize("key", [key for key, entry in LMCACHE_KEYS.items() if entry.fate == "same"])
def test_lmcache_variables_of_the_same_name(key: str) -> None:
    resolved = load_settings({f"LMCACHE_{key.upper()}": str(VALID[key])})
    assert getattr(resolved.settings, key) == VALID[key]
    assert resolved.notices == ()


@pytest.mark.parametrize(
    ("environ", "extra", "url"),
    [
        ({"LMCACHE_MP_HOST": "cache"}, {}, "tcp://cache:5555"),
        ({"LMCACHE_MP_PORT": "7000"}, {}, "tcp://127.0.0.1:7000"),
        ({"LMCACHE_MP_HOST": "cache", "LMCACHE_MP_PORT": "7000"}, {}, "tcp://cache:7000"),
        ({}, {"lmcache.mp.host": "tcp://localhost", "lmcache.mp.port": 6555}, "tcp://localhost:6555"),
        ({}, {"lmcache.mp.port": "6555"}, "tcp://127.0.0.1:6555"),
        ({}, {"lmcache.mp.host": "h", "kvstrata.url": "ipc:///run/kv.sock"}, "ipc:///run/kv.sock"),
        ({"LMCACHE_MP_HOST": "h"}, {"url": "tcp://other:1"}, "tcp://other:1"),
    ],
)
def test_the_servers_address_as_lmcache_has_it(
    environ: dict[str, str], extra: dict[str, Any], url: str
) -> None:
    assert load_settings(environ, extra_config=extra).settings.server_url == url


def test_a_wrong_lmcache_port_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"LMCACHE_MP_PORT.*tcp://HOST:PORT"):
        load_settings({"LMCACHE_MP_PORT": "http"})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("chunksize", "chunk_size"),
        ("chunk_sise", "chunk_size"),
        ("remote_uri", "remote_url"),
        ("max_local_cpu", "max_local_cpu_size"),
        ("cache_polcy", "cache_policy"),
        ("evicton_policy", "eviction_policy"),
        ("ttl", None),
        ("zzz", None),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(
    name: str, near: str | None, tmp_path: Path
) -> None:
    hint = f"did you mean '{near}'" if near else f"unknown key '{name}'"
    for attempt in (
        lambda: load_settings({f"KVSTRATA_{name.upper()}": "1"}),
        lambda: load_settings({}, file=written(tmp_path / "c.yaml", {name: 1})),
        lambda: load_settings({}, extra_config={name: 1}),
        lambda: load_settings({}, extra_config={f"lmcache.{name}": 1}),
        lambda: load_settings({}, extra_config={f"kvstrata.{name}": 1}),
        lambda: load_settings({}, overrides={name: 1}),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert hint in str(caught.value)
        assert ("did you mean" in str(caught.value)) == (near is not None)


def test_an_unknown_lmcache_variable_is_only_a_notice() -> None:
    resolved = load_settings({"LMCACHE_CHUNKSIZE": "5", "LMCACHE_EC_FOO": "1"})
    assert resolved.settings == Settings()
    named = "LMCACHE_CHUNKSIZE (did you mean 'chunk_size'?), LMCACHE_EC_FOO"
    assert resolved.notices == (f"unknown environment variables, without effect: {named}",)


def test_lmcache_settings_without_effect_are_named_in_one_message(tmp_path: Path) -> None:
    content = {
        "enable_blending": True,
        "pre_caching_hash_algorithm": "sha256",
        "enable_p2p": False,
        "gds_path": None,
    }
    resolved = load_settings(
        {"LMCACHE_USE_LAYERWISE": "True", "LMCACHE_ENABLE_PD": "false"},
        file=written(tmp_path / "lmcache.yaml", content),
        extra_config={"lmcache.mp.mq_timeout": 300, "lmcache.extra_config": {"a": 1}},
    )
    (notice,) = resolved.notices
    for name in (
        "enable_blending",
        "pre_caching_hash_algorithm",
        "use_layerwise",
        "mp.mq_timeout",
        "extra_config",
    ):
        assert name in notice
    for name in ("enable_p2p", "gds_path", "enable_pd"):
        assert name not in notice


@pytest.mark.parametrize("name", ["USE_EXPERIMENTAL", "TRACK_USAGE", "DISABLE_BANNER"])
def test_some_lmcache_variables_are_not_worth_a_word(name: str) -> None:
    assert load_settings({f"LMCACHE_{name}": "True"}).notices == ()


@pytest.mark.parametrize("key", [key for key, entry in LMCACHE_KEYS.items() if "not" in entry.fate])
def test_lmcache_keys_without_effect_are_errors_under_our_own_prefix(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        load_settings({}, extra_config={f"kvstrata.{key}": 1})


def test_all_keys_of_lmcaches_table_are_accounted_for() -> None:
    for key, entry in LMCACHE_KEYS.items():
        if entry.fate == "same":
            assert key in SETTINGS
        elif entry.fate == "mapped":
            assert entry.note in SETTINGS
        else:
            assert key not in SETTINGS
            assert entry.note


def test_kubernetes_service_links_are_no_settings() -> None:
    links = {
        "KVSTRATA_PORT": "tcp://10.0.0.1:5555",
        "KVSTRATA_SERVICE_HOST": "10.0.0.1",
        "KVSTRATA_SERVICE_PORT": "5555",
        "KVSTRATA_SERVICE_PORT_HTTP": "8080",
        "KVSTRATA_PORT_5555_TCP": "tcp://10.0.0.1:5555",
        "KVSTRATA_PORT_5555_TCP_PROTO": "tcp",
        "KVSTRATA_PORT_5555_TCP_PORT": "5555",
        "KVSTRATA_PORT_5555_TCP_ADDR": "10.0.0.1",
        "KVSTRATA_SERVER_SERVICE_HOST": "10.0.0.1",
        "LMCACHE_REDIS_PORT_6379_TCP_ADDR": "10.0.0.2",
        "LMCACHE_REDIS_PORT": "tcp://10.0.0.2:6379",
    }
    resolved = load_settings(links)
    assert (resolved.settings, resolved.notices) == (Settings(), ())
    assert load_settings({"KVSTRATA_PORT": "7000"}).settings.port == 7000


def test_an_empty_variable_counts_as_not_set() -> None:
    resolved = load_settings({"KVSTRATA_CHUNK_SIZE": "", "KVSTRATA_REMOTE_URL": " "})
    assert resolved.sources["chunk_size"] == resolved.sources["remote_url"] == DEFAULT


def test_which_file_is_read(tmp_path: Path) -> None:
    own = written(tmp_path / "own.yaml", {"chunk_size": 1})
    lmcache = written(tmp_path / "lmcache.yaml", {"chunk_size": 2})
    argument = written(tmp_path / "argument.yaml", {"chunk_size": 3})
    both = {"KVSTRATA_CONFIG_FILE": str(own), "LMCACHE_CONFIG_FILE": str(lmcache)}
    assert load_settings({"LMCACHE_CONFIG_FILE": str(lmcache)}).settings.chunk_size == 2
    resolved = load_settings(both)
    assert resolved.settings.chunk_size == 1
    assert resolved.notices == ("KVSTRATA_CONFIG_FILE is used, LMCACHE_CONFIG_FILE names another file",)
    assert load_settings(both, file=argument).settings.chunk_size == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "expected a mapping"),
        ("chunk_size: [", "line 1 is not valid YAML"),
        ("a: 1\nremote_url: 'redis://:geheim@h", "is not valid YAML"),
        ("chunk_size: 1\nchunk_size: 2", "line 2 is not valid YAML: key 'chunk_size' stands there twice"),
        ("chunk_size: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_read(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({}, file=written(tmp_path / "c.yaml", content))
    assert message in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read: No such file"):
        load_settings({"LMCACHE_CONFIG_FILE": str(tmp_path / "absent.yaml")})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings({}, file=tmp_path / "binary")


def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    assert load_settings({}, file=written(tmp_path / "c.yaml", "# nothing\n")).settings == Settings()


def test_settings_travel_as_json_with_their_secrets() -> None:
    settings = load_settings(
        {"KVSTRATA_REMOTE_URL": "redis://:geheim@h:1"}, overrides={"ttl_seconds": 5}
    ).settings
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings
    assert "geheim" not in repr(settings)


@given(st.dictionaries(st.sampled_from(sorted(VALID)), st.none(), min_size=1))
def test_any_subset_of_keys_is_taken_as_given(chosen: dict[str, None]) -> None:
    wanted = {key: VALID[key] for key in chosen}
    environ = {f"KVSTRATA_{key.upper()}": as_variable(value) for key, value in wanted.items()}
    settings = load_settings(environ).settings
    assert settings == Settings(**wanted)
