"""The S3 tier: one object per frame, in any store that speaks S3.

A look-up is one HEAD per key that was not seen lately, all side by side (docs/adr has the measurements); a frame
that went meanwhile is a miss when it is read. S3 has no byte budget: objects go by a lifecycle rule of the bucket.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from kvstrata.errors import ConfigError, TierFull, TierUnavailable
from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.tiers.s3.known import Known
from kvstrata.tiers.s3.location import Location, parse_url
from kvstrata.tiers.s3.names import MAX_NAME_BYTES, name_key, object_name, scan_directory
from kvstrata.tiers.s3.profile import profile_credentials
from kvstrata.tiers.s3.requests import Requests
from kvstrata.types import Miss, TierStats

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config

log = logging.getLogger(__name__)

MAX_KNOWN_KEYS = 200_000
MIN_PART_BYTES = 5 << 20
"""S3 refuses smaller parts of an upload."""
_FULL = re.compile(r"StorageFull|QuotaExceeded|InsufficientStorage|EntityTooLarge|507 ")
_REFUSED = re.compile(r"SignatureDoesNotMatch|InvalidAccessKeyId|AccessDenied|ExpiredToken|InvalidToken")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status (?:code )?(\d{3}[^:]{0,40})")

T = TypeVar("T")


class S3Options(TierOptions, frozen=True, kw_only=True):
    """Settings of the S3 tier. ``timeout_seconds`` bounds one batch as a whole, retries included."""

    url: str
    """``s3://bucket/prefix?endpoint=&region=&addressing=&ca_file=``; never with credentials."""
    connect_timeout_seconds: float = 2.0
    """Deadline of a connection attempt."""
    max_requests: int = 64
    """Requests of one batch that are under way at once."""
    part_bytes: int = 8 << 20
    """Larger objects are read by ranges of this size side by side, and uploaded in parts of it."""
    multipart_bytes: int = 16 << 20
    """Larger frames are uploaded in parts."""
    known_seconds: float = 60.0
    """How long a key that was seen counts as held without asking. 0: every look-up asks for every key."""
    ttl_seconds: int | None = None
    """Not for S3, whose objects expire by a lifecycle rule of the bucket."""

    def __post_init__(self) -> None:
        """Check the URL. Raises ValueError, which msgspec turns into a ValidationError."""
        try:
            parse_url(self.url)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def __repr__(self) -> str:
        """Without the URL, into which someone may have put credentials."""
        return f"S3Options(name={self.name!r})"


class S3Tier(Tier):
    """Frames in a bucket."""

    kind: ClassVar[str] = "s3"
    Options: ClassVar[type[TierOptions]] = S3Options

    def __init__(self, options: S3Options) -> None:
        """Check the settings; the first operation connects.

        Raises:
            ConfigError: a setting cannot be used.
        """
        _check(options)
        self.options = options
        self.location = parse_url(options.url)
        self._root = f"{self.location.prefix}/" if self.location.prefix else ""
        self._requests = Requests(
            open_store(self.location, options),
            max_requests=options.max_requests,
            part_bytes=options.part_bytes,
        )
        self._known = Known(options.known_seconds, MAX_KNOWN_KEYS)
        self._greeting = threading.Lock()
        self._greeted = False

    def contains(self, keys: Sequence[str]) -> list[bool]:
        """See :class:`Tier`. Keys that were seen within ``known_seconds`` count as held without asking."""
        now = time.monotonic()
        unknown = self._known.unknown(keys, now)
        if unknown:
            held = self._run(self._requests.heads([self._name(key) for key in unknown]))
            found = [key for key, is_held in zip(unknown, held, strict=True) if is_held]
            self._known.add(found, now)
            absent = set(unknown).difference(found)
            return [key not in absent for key in keys]
        return [True] * len(keys)

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        """See :class:`Tier`."""
        if not keys:
            return []
        results = self._run(self._requests.get([self._name(key) for key in keys], buffers))
        self._known.discard(
            key for key, result in zip(keys, results, strict=True) if isinstance(result, Miss)
        )
        return results

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        """See :class:`Tier`.

        Raises:
            TierFull: the store has no room, or the key is longer than S3 allows.
        """
        if not keys:
            return
        names = [self._name(key) for key in keys]
        longest = max(map(len, names))
        if longest > MAX_NAME_BYTES:
            raise TierFull(f"an object name of {longest} bytes; S3 allows {MAX_NAME_BYTES}")
        now = time.monotonic()
        self._run(self._requests.put(names, frames, self.options.multipart_bytes))
        self._known.add(keys, now)

    def delete(self, keys: Sequence[str]) -> int:
        """See :class:`Tier`. One HEAD per key, which counts, and one request for all deletes."""
        if not keys:
            return 0
        self._known.discard(keys)
        return self._run(self._requests.delete([self._name(key) for key in dict.fromkeys(keys)]))

    def scan(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Tier`. By listing, a thousand objects a request."""
        self._run(_nothing())
        directory = self._root + scan_directory(prefix)
        pages = self._requests.pages(directory.rstrip("/"))
        while True:
            with self._translated():
                page = next(pages, None)
            if page is None:
                return
            for name in page:
                key = name_key(name.removeprefix(self._root))
                if key is not None and key.startswith(prefix):
                    yield key

    def stats(self) -> TierStats:
        """See :class:`Tier`. S3 tells neither number nor size without listing everything."""
        return TierStats()

    def describe(self) -> str:
        return self.location.describe()

    def close(self) -> None:
        """See :class:`Tier`. Idle connections close with the client, which goes with its last reference."""
        self._requests.close()

    def _name(self, key: str) -> str:
        return self._root + object_name(key)

    def _run(self, batch: Coroutine[Any, Any, T]) -> T:
        """Run the requests of one batch to their end, or the deadline.

        Raises:
            TierUnavailable, TierFull: the store did not serve it.
        """

        async def bounded() -> T:
            async with asyncio.timeout(self.options.timeout_seconds):
                if not self._greeted:
                    await self._greet()
                return await batch

        try:
            with self._translated():
                return asyncio.run(bounded())
        finally:
            batch.close()  # where it was never begun

    async def _greet(self) -> None:
        """Once: is there such a bucket, and may it be listed? Reading from none would be misses without end."""
        started = time.monotonic()
        await self._requests.check(self.location.prefix)
        with self._greeting:
            if not self._greeted:
                self._greeted = True
                milliseconds = (time.monotonic() - started) * 1000
                log.info("s3 tier: %s answers, a listing took %.0f ms", self.describe(), milliseconds)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what the client raises into the errors of the tier contract, without the server's own text."""
        try:
            yield
        except TimeoutError:
            raise TierUnavailable(
                f"{self.describe()} did not answer within {self.options.timeout_seconds:g} s"
            ) from None
        except (BaseError, FileNotFoundError, OSError) as error:
            text = f"{self.describe()}: {_said(error)}"
            if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(str(error)):
                raise TierUnavailable(f"{text}; check the credentials and the bucket's policy") from None
            raise (TierFull(text) if _FULL.search(str(error)) else TierUnavailable(text)) from None


async def _nothing() -> None:
    """A batch without requests."""


def _check(options: S3Options) -> None:
    if options.ttl_seconds is not None:
        raise ConfigError(
            "ttl_seconds of the s3 tier: objects expire by a lifecycle rule of the bucket only; docs/s3.md has one"
        )
    for field in ("part_bytes", "multipart_bytes"):
        if getattr(options, field) < MIN_PART_BYTES:
            raise ConfigError(
                f"{field} of the s3 tier is {getattr(options, field)}; at least {MIN_PART_BYTES}"
            )
    if options.max_requests < 1:
        raise ConfigError(f"max_requests of the s3 tier is {options.max_requests}; at least 1")


def _certificates(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"url of the s3 tier: ca_file {file} cannot be read: {error.strerror}") from None


def open_store(location: Location, options: S3Options) -> S3Store:
    """The client of a bucket.

    Raises:
        ConfigError: it does not take a setting.
    """
    timeout = timedelta(seconds=options.timeout_seconds)
    client: ClientConfig = {
        "allow_http": location.allow_http,
        "connect_timeout": timedelta(seconds=min(options.connect_timeout_seconds, options.timeout_seconds)),
        "timeout": timeout,
    }
    if location.ca_file:
        client["root_certificate"] = _certificates(location.ca_file)
    config: S3Config = {
        "region": location.region,
        "virtual_hosted_style_request": location.addressing == "virtual",
        # Hashing the body into the signature costs a quarter of the speed of writing (measured). TLS guards it in
        # transit, and a frame has its own checksum.
        "unsigned_payload": True,
    }
    if location.endpoint:
        config["endpoint"] = location.request_endpoint
    try:
        return S3Store(
            location.bucket,
            config=config,
            client_options=client,
            # Slowing down is answered with 503, which is to be tried again; the batch's deadline bounds it all.
            retry_config={
                "max_retries": 2,
                "retry_timeout": timeout,
                "backoff": {
                    "init_backoff": timedelta(milliseconds=50),
                    "max_backoff": timedelta(seconds=1),
                    "base": 2,
                },
            },
            credential_provider=profile_credentials(),
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"s3 tier {location.describe()}: {_said(error)}") from None


def _said(error: BaseException) -> str:
    """What happened, in one line. A server's own text may quote an access key or what was signed."""
    text = str(error)
    found = [match[1] for match in (_STATUS.search(text), _CODE.search(text)) if match]
    if isinstance(error, FileNotFoundError):
        return " ".join(["there is no such bucket", *found])
    if found:
        return f"refused: {', '.join(found)}"
    first = text.partition("\n")[0]
    return re.sub(r"Generic S3 error: |Error performing |\bhttps?://\S+ in \S+ - ", "", first)[:200]
