from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import obstore
import pytest
from obstore.exceptions import PreconditionError

from kvstrata.bench import tier as bench
from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.testing.process import free_port
from kvstrata.testing.proxy import Flow, Link, Proxy
from kvstrata.testing.s3_server import BUCKET, ENVIRONMENT, SECRET_KEY, S3Server
from kvstrata.testing.tier import TierContract, make_frame, make_keys, read_frames
from kvstrata.testing.waiting import retried
from kvstrata.tiers.base import Tier
from kvstrata.tiers.s3 import S3Options, S3Tier
from kvstrata.tiers.s3.names import object_name
from kvstrata.tiers.s3.requests import Requests
from kvstrata.types import Miss, MissReason

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-such-file"))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def open_tier(url: str, **options: object) -> S3Tier:
    return S3Tier(S3Options(url=url, **{"timeout_seconds": 30.0} | options))


@pytest.fixture
def url(s3_server: S3Server) -> str:
    """A prefix of its own for each test."""
    return s3_server.url(f"t{next(NUMBERS)}/kv")


@pytest.fixture
def tier(url: str) -> Iterator[S3Tier]:
    with contextlib.closing(open_tier(url)) as tier:
        yield tier


@pytest.fixture
def keys() -> list[str]:
    return make_keys(10)


class TestS3Tier(TierContract):
    @pytest.fixture
    def tier(self, url: str) -> Iterator[Tier]:
        with contextlib.closing(open_tier(url)) as tier:
            yield tier


class TestS3TierByRanges(TierContract):
    """All frames above 16 KiB are read by ranges, and every look-up asks."""

    @pytest.fixture
    def tier(self, url: str) -> Iterator[Tier]:
        with contextlib.closing(open_tier(url, known_seconds=0)) as tier:
            tier._requests._part_bytes = 16_384  # a user's parts are at least 5 MiB
            yield tier

    test_scan_of_many_while_deleting = None  # nothing of these depends on ranges
    test_scan_by_any_prefix = None
    test_odd_model_names = None
    test_large_batches = None
    test_close_is_idempotent = None


# -- objects as others see them


def test_one_object_per_frame_with_a_plain_name(s3_server: S3Server, url: str, keys: list[str]) -> None:
    with contextlib.closing(open_tier(url)) as tier:
        tier.write(keys[:1], [make_frame(5000)])
        root = tier.location.prefix
    (page,) = s3_server.store().list(prefix=root)
    (entry,) = page
    assert entry["path"] == f"{root}/vllm@org=2Fmodel@1/0/{keys[0][-64:]}.kv"
    assert entry["size"] == 5000


def test_objects_of_others_are_not_keys(s3_server: S3Server, tier: S3Tier, keys: list[str]) -> None:
    store, root = s3_server.store(), tier.location.prefix
    digest = "ab" * 32
    for name in ("notes.txt", f"{digest}.kv", f"vllm@m@1/x/{digest}.kv", f"vllm@m@1/0/{digest}.kv.bak"):
        store.put(f"{root}/{name}", b"theirs", use_multipart=False)
    store.put(f"{root}2/{object_name(keys[1])}", b"beside", use_multipart=False)
    tier.write(keys[:1], [make_frame(10)])
    assert list(tier.scan()) == keys[:1]
    assert list(tier.scan("vllm@m@1@")) == []


def test_large_frames_are_uploaded_in_parts(s3_server: S3Server, url: str, keys: list[str]) -> None:
    size = (13 << 20) + 5
    with contextlib.closing(open_tier(url, part_bytes=5 << 20, multipart_bytes=5 << 20)) as tier:
        tier.write(keys[:1], [make_frame(size)])
        assert read_frames(tier, keys[:1], room=size) == [bytes(make_frame(size))]
        (entry,) = next(iter(s3_server.store().list(prefix=tier.location.prefix)))
    assert entry["e_tag"].strip('"').endswith("-3"), "the tag of an object of three parts"


# -- what is known


def test_a_key_that_was_seen_is_not_asked_for_again(url: str, keys: list[str]) -> None:
    with contextlib.closing(open_tier(url)) as one, contextlib.closing(open_tier(url)) as other:
        one.write(keys[:2], [make_frame(100)] * 2)
        assert other.contains(keys[:3]) == [True, True, False]
        assert other.contains(keys[1:2]) == [True]
        assert one.delete(keys[:1]) == 1
        assert other.contains(keys[:2]) == [True, True], "it was seen a moment ago"
        assert read_frames(other, keys[:2]) == [Miss(MissReason.ABSENT), bytes(make_frame(100))]
        assert other.contains(keys[:2]) == [False, True], "the read has found out"
        one.write(keys[2:3], [make_frame(100)])
        assert other.contains(keys[2:3]) == [True], "what was absent is asked for each time"


# -- servers that are odd, or down


def _without_range(data: bytes) -> bytes:
    return data.replace(b"\r\nrange: ", b"\r\nx-not: ")


def test_a_server_that_ignores_ranges_gives_right_answers(
    s3_server: S3Server,
    url: str,
    keys: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with contextlib.closing(open_tier(url)) as tier:
        tier.write(keys[:4], [make_frame(100_000 + at, at) for at in range(4)])
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")  # the signature covers the header
    with Proxy(("127.0.0.1", s3_server.port)) as proxy:
        proxy.link = Link(to_server=Flow(rewrite=_without_range))
        odd = url.replace(str(s3_server.port), str(proxy.port))
        with contextlib.closing(open_tier(odd)) as tier:
            tier._requests._part_bytes = 16_384
            for _ in range(2):
                frames = read_frames(tier, keys[:4], room=200_000)
                assert frames == [bytes(make_frame(100_000 + at, at)) for at in range(4)]
            (large,) = tier.read(keys[:1], [memoryview(bytearray(99_999))])
            assert isinstance(large, Miss)
            assert large.reason == MissReason.CORRUPT
    assert [record.levelname for record in caplog.records].count("WARNING") >= 1
    assert "ignores the Range header" in caplog.text


def test_bodies_that_nobody_reads_are_let_go(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or their connections stay, for as long as something holds the answers."""
    answers: list[Any] = []
    get = obstore.get_async

    async def get_and_hold(*arguments: Any, **options: Any) -> Any:
        answers.append(await get(*arguments, **options))
        return answers[-1]

    monkeypatch.setattr(obstore, "get_async", get_and_hold)
    (key,) = make_keys(1)
    with contextlib.closing(open_tier(url)) as tier:
        tier.write([key], [make_frame(100_000)])
        for tier._requests._part_bytes in (200_000, 16_384):
            (miss,) = read_frames(tier, [key], room=99_999)
            assert isinstance(miss, Miss)
            assert miss.reason == MissReason.CORRUPT
    assert len(answers) == 2
    for answer in answers:
        with pytest.raises(ValueError, match="disposed"):
            answer.stream()


@pytest.mark.usefixtures("s3_server")  # then the library's own threads are there
def test_a_body_longer_than_announced_is_unavailable_and_stays_inside_its_buffer() -> None:
    """Of a range, whose size is in another header than the body's."""
    part = 8 << 20
    listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    head = b"HTTP/1.1 206 Partial Content\r\nETag: x\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n"
    head += b"Content-Range: bytes 0-%d/%d\r\nContent-Length: %d\r\n" % (part - 1, part, part + 10)

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    is_listing = b"list-type" in connection.recv(1 << 16)
                    answer = (
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(listing) if is_listing else head
                    )
                    body = listing if is_listing else bytes(part + 10)
                    connection.sendall(answer + b"Connection: close\r\n\r\n" + body)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        memory = memoryview(bytearray(b"\xaa" * (part + 100)))
        tier = open_tier(f"s3://{BUCKET}?endpoint=http://127.0.0.1:{listener.getsockname()[1]}")
        with contextlib.closing(tier), pytest.raises(TierUnavailable, match="announced"):
            tier.read(make_keys(1), [memory[: part + 50]])
        assert memory[part:] == b"\xaa" * 100
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


class _Body:
    """An answer of which the last bytes are late."""

    def __init__(self, data: bytes, size: int, seconds: float) -> None:
        self.meta = {"size": size, "e_tag": "old"}
        self._data, self._seconds = data, seconds

    async def stream(self, min_chunk_size: int) -> AsyncIterator[bytes]:
        await asyncio.sleep(self._seconds)
        yield self._data


def test_ranges_of_an_object_that_is_replaced_do_not_get_into_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def get(store: object, name: str, options: Any = None) -> _Body:
        if options is None:
            return _Body(b"n" * 30, 30, 0.0)
        start, end = options["range"]
        if start == 10:
            raise PreconditionError("replaced")
        return _Body(b"o" * (end - start), 30, 0.05 if start == 20 else 0.0)

    async def run() -> None:
        buffer = memoryview(bytearray(30))
        found = Requests(cast("Any", object()), max_requests=4, part_bytes=10)
        assert await found.get(["name"], [buffer]) == [30]
        await asyncio.sleep(0.1)
        assert bytes(buffer) == b"n" * 30

    monkeypatch.setattr(obstore, "get_async", get)
    asyncio.run(run())


def operations(tier: S3Tier, keys: list[str]) -> list[Callable[[], Any]]:
    return [
        lambda: tier.contains(keys),
        lambda: read_frames(tier, keys),
        lambda: tier.write(keys, [make_frame(10)] * len(keys)),
        lambda: tier.delete(keys),
        lambda: list(tier.scan()),
    ]


def test_a_server_that_hangs_and_one_that_is_not_there(
    s3_server: S3Server, url: str, keys: list[str]
) -> None:
    with contextlib.closing(open_tier(url, timeout_seconds=0.5, known_seconds=0)) as tier:
        retried(lambda: tier.write(keys[:2], [make_frame(100)] * 2), TierUnavailable)
        s3_server.suspend()
        try:
            for operation in operations(tier, keys[:2]):
                with pytest.raises(TierUnavailable):
                    operation()
        finally:
            s3_server.resume()
    with contextlib.closing(
        open_tier(url)
    ) as tier:  # what was given up may yet have happened to the first two
        tier.write(keys[2:4], [make_frame(100)] * 2)
        assert read_frames(tier, keys[2:4]) == [bytes(make_frame(100))] * 2
    nobody = url.replace(str(s3_server.port), str(free_port()))
    with contextlib.closing(open_tier(nobody, timeout_seconds=0.5)) as tier:
        for operation in operations(tier, keys[:2]):
            with pytest.raises(TierUnavailable):
                operation()


def test_refused_credentials_are_unavailable_and_not_shown(
    url: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    with contextlib.closing(open_tier(url)) as tier:
        for operation in operations(tier, keys[:1]):
            with pytest.raises(TierUnavailable, match="check the credentials") as raised:
                operation()
            assert "wrong-and-secret" not in str(raised.value)
            assert ENVIRONMENT["AWS_ACCESS_KEY_ID"] not in str(raised.value)


def test_a_missing_bucket_is_no_miss(url: str, keys: list[str]) -> None:
    with contextlib.closing(open_tier(url.replace(BUCKET, "no-such-bucket"))) as tier:
        for operation in operations(tier, keys[:1]):
            with pytest.raises(TierUnavailable):
                operation()


def test_a_profile_of_the_shared_file(
    url: str, keys: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = nobody\naws_secret_access_key = x\n[team]\n"
        f"aws_access_key_id = {ENVIRONMENT['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    with contextlib.closing(open_tier(url)) as tier, pytest.raises(TierUnavailable):
        tier.contains(keys)
    monkeypatch.setenv("AWS_PROFILE", "team")
    with contextlib.closing(open_tier(url)) as tier:
        assert tier.contains(keys) == [False] * 10
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with contextlib.closing(open_tier(url)) as tier, pytest.raises(TierUnavailable):
        tier.contains(keys)


def test_a_key_too_long_for_s3_is_refused_and_not_held(tier: S3Tier) -> None:
    long = make_keys(1, "模" * 300)
    assert tier.contains(long) == [False]
    assert read_frames(tier, long) == [Miss(MissReason.ABSENT)]
    with pytest.raises(TierFull, match="S3 allows 1024"):
        tier.write(long, [make_frame(10)])


def test_the_first_operation_says_what_it_found(
    tier: S3Tier, keys: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstrata")
    tier.contains(keys)
    tier.contains(keys)
    (record,) = [record for record in caplog.records if record.name.startswith("kvstrata.tiers.s3")]
    assert tier.describe() in record.getMessage()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ttl_seconds": 5}, "lifecycle rule"),
        ({"part_bytes": 1000}, "part_bytes"),
        ({"multipart_bytes": 1000}, "multipart_bytes"),
        ({"max_requests": 0}, "max_requests"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        open_tier("s3://bucket", **options)


def test_certificates_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="ca_file /no/such cannot be read"):
        open_tier("s3://bucket?ca_file=/no/such")


def test_the_benchmark_compares_with_a_raw_loop_and_leaves_nothing(s3_server: S3Server, url: str) -> None:
    report = bench.run(bench.TierBenchConfig(url=url, frame_bytes=50_000, num_frames=2, runs=1))
    assert set(report.ratios) == {"read_over_raw", "write_over_raw"}
    assert list(s3_server.store().list(prefix=url.partition("?")[0].removeprefix(f"s3://{BUCKET}/"))) == []
