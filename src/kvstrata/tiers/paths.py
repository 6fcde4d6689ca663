"""Keys as paths of files, and back."""

from __future__ import annotations

import functools
import re
from urllib.parse import quote, unquote

from kvstrata.errors import TierFull

SUFFIX = ".kv"
NAME_BYTES = 200
"""A quoted namespace longer than this goes on in a subdirectory (file systems allow 255)."""
PATH_BYTES = 3000
"""Of the longest path below the tier's directory (systems allow 4,096 for both together)."""

_HEAD = re.compile(r"([!-?A-~]+@[!-?A-~]+@[0-9]+)@([0-9]+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_BYTES = len("/ab/") + 64 + len(SUFFIX)


def key_path(key: str) -> str | None:
    """The path of ``key``'s file relative to the tier's directory; None for what is not a key, or one too long."""
    head, _, digest = key.rpartition("@")
    directory = _key_directory(head)
    if directory is None or _DIGEST.fullmatch(digest) is None:
        return None
    return f"{directory}/{digest[:2]}/{digest}{SUFFIX}"


def path_to_write(key: str) -> str:
    """The path of a key that is to be written.

    Raises:
        TierFull: the key is too long for a path.
        ValueError: not a key.
    """
    path = key_path(key)
    if path is not None:
        return path
    head, _, digest = key.rpartition("@")
    if _HEAD.fullmatch(head) and _DIGEST.fullmatch(digest):
        raise TierFull(f"a key of {len(key)} bytes is too long for a path of {PATH_BYTES}")
    raise ValueError(f"not a key of kvstrata: {key!r}")


@functools.lru_cache(4096)
def _key_directory(head: str) -> str | None:
    """The directory for keys that begin with ``head``, which is all but the chunk hash."""
    match = _HEAD.fullmatch(head)
    if match is None:
        return None
    quoted = quote(match[1], safe="@+=,")
    parts = [quoted[start : start + NAME_BYTES] for start in range(0, len(quoted), NAME_BYTES)]
    directory = "/".join([*parts, match[2]])
    return directory if len(directory) + _FILE_BYTES <= PATH_BYTES else None


def path_key(path: str) -> str | None:
    """The key of a relative path; None for a file that is not one of ours."""
    *namespace, worker, _, name = path.split("/")
    key = f"{unquote(''.join(namespace))}@{worker}@{name.removesuffix(SUFFIX)}"
    return key if key_path(key) == path else None


def may_hold(directory: str, prefix: str) -> bool:
    """Whether keys with ``prefix`` can lie below ``directory`` (relative to the root)."""
    name, _, below = directory.partition("/")
    if len(name) == NAME_BYTES:
        return True  # it may go on in a subdirectory, even in the middle of a quoted character
    known = unquote(name)
    return "@" in name and (bool(below) or known.startswith(prefix) or prefix.startswith(known))
