"""The lm tier against kvstrata's own remote server, and against one that does what LMCache's does."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvstrata.config import tier_from_url
from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.testing.tier import ODD_MODEL_NAMES, TierContract, make_frame, make_keys, read_frames
from kvstrata.tiers.base import Tier
from kvstrata.tiers.lm import LmOptions, LmTier, wire
from kvstrata.types import Miss, MissReason


def open_tier(url: str, **options: object) -> LmTier:
    return LmTier(LmOptions(url=url, **options))


def emptied(tier: LmTier) -> LmTier:
    tier.delete(list(tier.scan()))
    return tier


@pytest.fixture(scope="module")
def server() -> Iterator[RemoteServerThread]:
    with RemoteServerThread() as server:
        yield server


@pytest.fixture(scope="module")
def lmcache_server() -> Iterator[RemoteServerThread]:
    with RemoteServerThread(extensions=False) as server:
        yield server


@pytest.fixture(scope="module")
def lm_certificates(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("cryptography", reason="system: needs the package cryptography")
    from kvstrata.testing.tls import Certificates  # noqa: PLC0415 - needs cryptography

    return Certificates(tmp_path_factory.mktemp("lm-tls"))


@pytest.fixture(scope="module")
def tls_server(lm_certificates: Any) -> Iterator[RemoteServerThread]:
    path = lm_certificates.path
    with RemoteServerThread(
        tls_cert=path("server.crt"), tls_key=path("server.key"), token=b"a token"
    ) as server:
        yield server


@pytest.fixture
def keys() -> list[str]:
    return make_keys(10)


@pytest.fixture
def tier(server: RemoteServerThread) -> Iterator[LmTier]:
    with contextlib.closing(open_tier(server.url)) as tier:
        yield emptied(tier)


class TestLmTier(TierContract):
    @pytest.fixture
    def tier(self, server: RemoteServerThread) -> Iterator[Tier]:
        with contextlib.closing(open_tier(server.url)) as tier:
            yield emptied(tier)


class TestLmTierWithDisk(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with (
            RemoteServerThread(disk=str(tmp_path), max_bytes=128 << 20) as server,
            contextlib.closing(open_tier(server.url, ttl_seconds=1000)) as tier,
        ):
            yield tier


class TestLmTierOverTLSWithToken(TierContract):
    @pytest.fixture
    def tier(self, tls_server: RemoteServerThread, lm_certificates: Any, tmp_path: Path) -> Iterator[Tier]:
        (tmp_path / "token").write_text("a token\n")
        url = f"lms://127.0.0.1:{tls_server.port}?ssl_ca_certs={lm_certificates.path('authority.crt')}"
        with contextlib.closing(open_tier(url, token_file=str(tmp_path / "token"), checksums=True)) as tier:
            yield emptied(tier)


class TestServerOfLMCache(TierContract):
    """What it cannot do is overridden: it cannot list, and a deleted entry is still there, but empty."""

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        with (
            RemoteServerThread(extensions=False) as server,
            contextlib.closing(open_tier(server.url)) as tier,
        ):
            yield tier

    def test_overwriting_replaces(self, tier: Tier) -> None:
        (key,) = make_keys(1)
        for size in (5000, 100, 9000):
            tier.write([key], [make_frame(size, size)])
            assert read_frames(tier, [key]) == [bytes(make_frame(size, size))]

    def test_delete_drops_and_counts(self, tier: Tier) -> None:
        keys = make_keys(4)
        tier.write(keys, [make_frame(100)] * 4)
        assert tier.delete([*keys[:2], *make_keys(1, seed=9)]) == 2
        assert tier.contains(keys) == [True] * 4
        assert [isinstance(result, Miss) for result in read_frames(tier, keys)] == [True, True, False, False]

    def test_odd_model_names(self, tier: Tier) -> None:
        """Every one, in one server: no two get in each other's way."""
        keys = [key for name in ODD_MODEL_NAMES for key in make_keys(2, name)]
        frames = [make_frame(100, seed) for seed in range(len(keys))]
        tier.write(keys, frames)
        assert read_frames(tier, keys) == [bytes(frame) for frame in frames]

    def test_scan_by_any_prefix(self, tier: Tier, caplog: pytest.LogCaptureFixture) -> None:
        tier.write(make_keys(3), [make_frame(10)] * 3)
        assert list(tier.scan()) == list(tier.scan("v")) == []
        assert "cannot list" in caplog.text

    def test_scan_of_many_while_deleting(self, tier: Tier) -> None:
        keys = make_keys(500)
        tier.write(keys, [make_frame(10)] * 500)
        assert sum(tier.delete([key]) for key in keys) == 500


def test_no_more_connections_than_workers(server: RemoteServerThread) -> None:
    before = server.service.counters.connections
    with contextlib.closing(open_tier(server.url, num_workers=3)) as tier:
        keys = make_keys(100)
        with ThreadPoolExecutor(12) as threads:
            list(threads.map(lambda key: tier.write([key], [make_frame(50_000)]), keys))
            assert all(threads.map(lambda key: tier.contains([key]) == [True], keys))
        assert 1 <= server.service.counters.connections - before <= 3


def test_the_first_connection_says_once_what_is_there(
    server: RemoteServerThread, lmcache_server: RemoteServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    for each, text in ((server, "a kvstrata remote server"), (lmcache_server, "a server of LMCache")):
        with contextlib.closing(open_tier(each.url)) as tier, ThreadPoolExecutor(4) as threads:
            list(threads.map(tier.contains, [make_keys(1)] * 8))
        assert sum(text in record.getMessage() for record in caplog.records) == 1


def test_a_frame_over_the_servers_limit_is_refused_and_the_connection_stays(keys: list[str]) -> None:
    with (
        RemoteServerThread(max_frame_bytes=1000) as server,
        contextlib.closing(open_tier(server.url, num_workers=1)) as tier,
    ):
        with pytest.raises(TierFull, match="--max-frame-mb"):
            tier.write(keys[:2], [make_frame(1000), make_frame(1001)])
        tier.write(keys[:1], [make_frame(1000)])
        assert list(tier.scan()) == keys[:1]
        assert server.service.counters.connections == 1


def test_a_frame_larger_than_the_store_is_full(keys: list[str]) -> None:
    with RemoteServerThread(max_bytes=1 << 20) as server, contextlib.closing(open_tier(server.url)) as tier:
        with pytest.raises(TierFull, match="1 of 3"):
            tier.write(keys[:3], [make_frame(size) for size in (1000, 1_100_000, 2000)])
        assert tier.contains(keys[:3]) == [True, False, True]


def test_scans_have_pages(tier: LmTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstrata.remote.service._MAX_PAGE", 7)
    monkeypatch.setattr("kvstrata.remote.service._MAX_EXAMINED", 11)
    keys = [*make_keys(100, "org/a"), *make_keys(30, "org/b")]
    tier.write(keys, [make_frame(10)] * len(keys))
    assert sorted(tier.scan()) == sorted(keys)
    assert sorted(tier.scan("vllm@org/b")) == sorted(keys[100:])
    many = [tier.scan() for _ in range(17)]
    firsts = [next(scan) for scan in many]
    assert len(set(firsts)) == 1
    with pytest.raises(TierUnavailable, match="start over"):
        list(many[0])
    assert sorted([firsts[16], *many[16]]) == sorted(keys)


def test_entries_of_lmcache_clients_are_left_out(
    tier: LmTier, server: RemoteServerThread, keys: list[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(wire.Request(wire.Command.PUT, b"org/model@1@0@abc@half", 3).pack() + b"abc")
        sock.sendall(wire.Request(wire.Command.HEALTH, b"").pack())
        assert len(sock.recv(36, socket.MSG_WAITALL)) == 36
    tier.write(keys[:1], [make_frame(10)])
    assert list(tier.scan()) == keys[:1]


# -- tokens


@pytest.mark.parametrize("token", ["", ":wrong@"])
def test_a_wrong_token_is_unavailable(token: str, keys: list[str]) -> None:
    with RemoteServerThread(token=b"the-token") as server:
        with contextlib.closing(open_tier(f"lm://{token}127.0.0.1:{server.port}")) as tier:
            with pytest.raises(TierUnavailable, match="token") as raised:
                tier.contains(keys)
            assert "wrong@" not in str(raised.value)
        with contextlib.closing(open_tier(server.url)) as tier:
            assert tier.contains(keys) == [False] * 10


@pytest.mark.parametrize("extensions", [True, False])
def test_a_token_is_not_given_to_a_server_that_does_not_know_it(extensions: bool, keys: list[str]) -> None:
    with RemoteServerThread(extensions=extensions) as server:
        tier = open_tier(f"lm://:secret@127.0.0.1:{server.port}")
        with contextlib.closing(tier), pytest.raises(TierUnavailable, match="knows no token"):
            tier.write(keys[:1], [make_frame(10)])


def test_a_server_with_another_token_is_found_out() -> None:
    """It says yes to whatever the client proves, but cannot prove that it has the token."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def impostor() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(wire.REQUEST_BYTES, socket.MSG_WAITALL)
                sock.sendall(wire.Hello(bytes(16), True, 1000).pack())
                sock.recv(wire.CALL_BYTES + wire.PROOF_BYTES, socket.MSG_WAITALL)
                sock.sendall(wire.Answer(wire.Verb.PROVE, body_bytes=32).pack() + bytes(32))
                sock.recv(1)

        thread = threading.Thread(target=impostor)
        thread.start()
        tier = open_tier(f"lm://:secret@127.0.0.1:{listener.getsockname()[1]}")
        with contextlib.closing(tier), pytest.raises(TierUnavailable, match="does not have our token"):
            tier.contains(make_keys(1))
        thread.join()


@pytest.mark.parametrize("authority", ["other_authority", "authority"])
def test_certificates_are_checked(lm_certificates: Any, authority: str, keys: list[str]) -> None:
    path = lm_certificates.path
    name = "server" if authority == "other_authority" else "elsewhere"
    options = {"tls_cert": path(f"{name}.crt"), "tls_key": path(f"{name}.key")}
    with RemoteServerThread(**options) as server:
        url = f"lms://127.0.0.1:{server.port}?ssl_ca_certs={path(authority + '.crt')}"
        with contextlib.closing(open_tier(url)) as tier, pytest.raises(TierUnavailable, match="certificate"):
            tier.contains(keys)
        with contextlib.closing(open_tier(f"{url}&ssl_cert_reqs=none")) as tier:
            assert tier.contains(keys) == [False] * 10


# -- settings


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("lm://host", "host:port"),
        ("lm://:1234", "host:port"),
        ("lm://host:1234/path", "host:port"),
        ("lm://host:notaport", "cannot be read"),
        ("lm://:s3cret/x@host:1234", "cannot be read|host:port"),
        ("lm://:12#s3cret@host:1234", "cannot be read"),
        ("lm://tok:12?s3cret=x@host:1234", "cannot be read"),
        ("lm://host:1234?ssl_ca_certs=/x", "needs lms"),
        ("lms://host:1234?ssl_ca_cert=/x", "did you mean 'ssl_ca_certs'"),
        ("lms://host:1234?ssl_cert_reqs=maybe", "required, none"),
        ("redis://host:1234", "scheme"),
    ],
)
def test_wrong_urls_are_refused_when_the_configuration_is_checked(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text) as raised:
        LmOptions(url=url)
    assert "s3cret" not in str(raised.value)
    if url.startswith("lm"):
        with pytest.raises(ConfigError) as raised_by_config:
            tier_from_url(url)
        assert "s3cret" not in str(raised_by_config.value)


def test_secrets_do_not_show(tmp_path: Path) -> None:
    with contextlib.closing(open_tier("lm://:s3cret@host:1234")) as tier:
        assert "s3cret" not in tier.describe() + repr(tier.options)
    with pytest.raises(ValueError, match="one of them") as raised:
        LmOptions(url="lm://:s3cret@host:1", token_file=str(tmp_path))
    assert "s3cret" not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        open_tier("lm://host:1", token_file=str(tmp_path / "absent"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        open_tier("lm://host:1", token_file=str(tmp_path / "empty"))


def test_a_server_that_is_not_there(keys: list[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        tier = open_tier(f"lm://127.0.0.1:{unused.getsockname()[1]}")
        with contextlib.closing(tier), pytest.raises(TierUnavailable, match="cannot connect"):
            tier.contains(keys)


def test_it_is_used_again_after_a_restart(keys: list[str]) -> None:
    with RemoteServerThread() as server, contextlib.closing(open_tier(server.url)) as tier:
        tier.write(keys[:1], [make_frame(100)])
        server.stop()
        with pytest.raises(TierUnavailable):
            tier.contains(keys)
        server.start()
        assert tier.contains(keys[:1]) == [False]
        tier.write(keys[:1], [make_frame(100)])
        assert read_frames(tier, keys[:2]) == [bytes(make_frame(100)), Miss(MissReason.ABSENT)]
