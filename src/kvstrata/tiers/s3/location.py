"""Where the objects are: ``s3://bucket/prefix?endpoint=&region=&addressing=&ca_file=``."""

from __future__ import annotations

import os
import re
from typing import Literal, cast
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers.urls import unknown_parameter

PARAMETERS = ("endpoint", "region", "addressing", "ca_file")
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PREFIX = re.compile(r"(?!\.{1,2}(/|$))[A-Za-z0-9._@=+-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9._@=+-]+)*")

Addressing = Literal["path", "virtual"]


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """A bucket and a prefix in it. There is no secret in it."""

    bucket: str
    prefix: str = ""
    """Without slashes around it."""
    endpoint: str = ""
    """``https://host[:port]``; that of AWS for the region when empty."""
    region: str = "us-east-1"
    addressing: Addressing = "path"
    """Whether the bucket is in the path of requests or in the host's name."""
    ca_file: str = ""
    """Certificates to trust besides those of the system."""

    @property
    def allow_http(self) -> bool:
        """Plain HTTP only where the endpoint says so itself."""
        return self.endpoint.startswith("http://")

    @property
    def request_endpoint(self) -> str:
        """The endpoint as the client wants it: with the bucket in it for virtual addressing."""
        if not self.endpoint or self.addressing == "path":
            return self.endpoint
        parts = urlsplit(self.endpoint)
        return urlunsplit((parts.scheme, f"{self.bucket}.{parts.netloc}", parts.path, "", ""))

    def describe(self) -> str:
        place = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        return f"{place} at {self.endpoint or f'AWS, {self.region}'}"


def parse_url(url: str) -> Location:
    """Read the URL of an S3 tier. What it leaves open comes from ``AWS_ENDPOINT_URL`` and ``AWS_REGION``.

    Raises:
        ConfigError: another form. The message never has what may be a secret.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ConfigError(
            "url of the s3 tier cannot be read; it is s3://bucket/prefix?endpoint=&region="
        ) from None
    if parts.scheme != "s3":
        raise ConfigError(f"url of the s3 tier: scheme {parts.scheme[:20]!r}; allowed is s3")
    if "@" in parts.netloc:
        raise ConfigError(
            "url of the s3 tier: credentials in the URL are refused; it is s3://bucket/prefix, and they come from"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile in ~/.aws/credentials, or the instance's role"
        )
    for name in query:
        if name not in PARAMETERS:
            raise unknown_parameter(
                "s3", name, PARAMETERS, otherwise=f"; allowed are {', '.join(PARAMETERS)}"
            )
    if not _BUCKET.fullmatch(parts.netloc):
        raise ConfigError("url of the s3 tier: no bucket name; it is s3://bucket/prefix")
    prefix = unquote(parts.path).strip("/")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise ConfigError("url of the s3 tier: a prefix has letters, digits, . _ - @ = + and single slashes")
    endpoint = _endpoint(query.get("endpoint") or _first_set(ENDPOINT_VARIABLES))
    return Location(
        bucket=parts.netloc,
        prefix=prefix,
        endpoint=endpoint,
        region=query.get("region") or _first_set(REGION_VARIABLES) or "us-east-1",
        addressing=_addressing(query.get("addressing", "path" if endpoint else "virtual"), parts.netloc),
        ca_file=query.get("ca_file", ""),
    )


def _first_set(variables: tuple[str, ...]) -> str:
    return next((os.environ[name] for name in variables if os.environ.get(name)), "")


def _endpoint(text: str) -> str:
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "url of the s3 tier: endpoint is https://host[:port], or http:// where that is meant"
        )
    return text.rstrip("/")


def _addressing(text: str, bucket: str) -> Addressing:
    if text not in ("path", "virtual"):
        raise ConfigError(f"url of the s3 tier: addressing={text[:20]!r}; allowed are path, virtual")
    # A dot in a bucket's name breaks the certificate of its host name.
    return "path" if "." in bucket else cast("Addressing", text)
