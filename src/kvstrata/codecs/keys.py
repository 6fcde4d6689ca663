"""The keys of ``aesgcm``: a file of them, and the keys of entries that are derived from them."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvstrata.errors import ConfigError

_KEY_BYTES = 32
_ID_CHARACTERS = 8
_HOW = "make one with: (umask 077; openssl rand -hex 32 > FILE)"


class KeyRing:
    """Keys by their ids, from a file with one key per line: 64 hexadecimal digits; ``#`` begins a comment.

    The first is the one to write with, all are for reading. An id is derived from its key. Never shown: the keys.
    """

    def __init__(self, path: str) -> None:
        """
        Raises:
            ConfigError: the file cannot be read, others may read it, or a line is no key.
        """
        self._path = path
        self._keys = {_key_id(key): key for key in _read_keys(Path(path))}
        self.writing_id = next(iter(self._keys))
        """The id of the first key."""

    def __repr__(self) -> str:
        return f"KeyRing({self._path!r}, ids={list(self._keys)})"

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys

    def derive(self, key_id: str, identity: bytes) -> bytes:
        """The 32-byte key of the entry that ``identity`` stands for, by HKDF-SHA256 (RFC 5869)."""
        info = b"kvstrata aesgcm v1\0" + identity
        return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=info).derive(self._keys[key_id])


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"kvstrata key id\0" + key).hexdigest()[:_ID_CHARACTERS]


def _read_keys(path: Path) -> list[bytes]:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # a pipe would be waited for, and is empty the second time
            raise ConfigError(f"key file {path} is not a regular file; {_HOW}")
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise ConfigError(
                f"key file {path} may be read or changed by others (mode {stat.S_IMODE(mode):o}): chmod 600 it"
            )
        with path.open() as file:
            lines = [line.partition("#")[0].strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"key file {path} cannot be read: {reason}; {_HOW}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            key = bytes.fromhex(line)
        except ValueError:
            key = b""
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"key file {path}: line {number} is not 64 hexadecimal digits; {_HOW}")
        keys.append(key)
    if not keys:
        raise ConfigError(f"key file {path} has no key; {_HOW}")
    return keys
