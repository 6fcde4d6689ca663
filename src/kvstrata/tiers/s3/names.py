"""Keys as names of objects, and back.

``<prefix>/<engine@model@world size>/<worker>/<chunk hash>.kv``, in letters, digits and ``. _ - @ =`` only: clients
and servers treat them alike, unlike ``%``, ``+``, ``~``, spaces and all beyond ASCII. What is outside is written as
``=`` and two hexadecimal digits per byte.
"""

from __future__ import annotations

import functools
import re

from kvstrata.types import parse_key

SUFFIX = ".kv"
MAX_NAME_BYTES = 1024
"""S3's limit."""
SEGMENT_BYTES = 180
"""A longer namespace goes on in the next segment: some servers keep segments as names of directories."""

_CONTINUED = "=."
"""What the second and later segments of a namespace begin with; escapes never look so."""
_UNSAFE = re.compile(rb"[^A-Za-z0-9._@-]|^\.")
_ESCAPED = re.compile(rb"=([0-9A-F]{2})")


def object_name(key: str) -> str:
    """The name of ``key``'s object below the tier's prefix. Two keys never have the same."""
    head, _, digest = key.rpartition("@")
    namespace, _, worker = head.rpartition("@")
    return f"{namespace_directory(namespace)}/{_escape(worker)}/{_escape(digest)}{SUFFIX}"


@functools.lru_cache(1024)
def namespace_directory(namespace: str) -> str:
    """Where the keys of ``engine@model@world size`` lie."""
    escaped = _escape(namespace)
    parts = [escaped[start : start + SEGMENT_BYTES] for start in range(0, len(escaped), SEGMENT_BYTES)]
    return f"/{_CONTINUED}".join(parts)


def name_key(name: str) -> str | None:
    """The key of an object below the tier's prefix; None for one that is not ours."""
    parts = name.split("/")
    if len(parts) < 3:
        return None
    first, *more, worker, file = parts
    joined = first + "".join(part.removeprefix(_CONTINUED) for part in more)
    key = "@".join(map(_unescape, (joined, worker, file.removesuffix(SUFFIX))))
    try:
        parse_key(key)
    except ValueError:
        return None
    return key if object_name(key) == name else None


def scan_directory(prefix: str) -> str:
    """The directory that holds all keys that begin with ``prefix``; empty where that is the whole store."""
    parts = prefix.split("@")
    return namespace_directory("@".join(parts[:3])) if len(parts) > 3 else ""


def _escape(text: str) -> str:
    """``text`` as a segment; ``=`` stands for the empty one, which S3 clients do not agree on."""
    raw = text.encode("utf-8", "surrogatepass")
    return _UNSAFE.sub(lambda match: b"=%02X" % match[0][0], raw).decode() or "="


def _unescape(segment: str) -> str:
    raw = segment.encode("utf-8", "surrogatepass") if segment != "=" else b""
    return _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), raw).decode("utf-8", "replace")
