"""``aesgcm``: encryption at rest, AES-256-GCM (NIST SP 800-38D).

Every entry has a key of its own, derived from a key of the key file and the entry's identity: its chunk hash, which
begins with namespace and cache salt, its shard and its group. So no two salts share a key, and random nonces never
run out. All that the header says of the payload is authenticated: an entry in another's place does not decrypt.

Encoded: nonce (12 bytes), ciphertext, tag (16 bytes). Parameters: ``v1,KEYID``.
"""

from __future__ import annotations

import os
import struct
from typing import ClassVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstrata.codecs.base import Codec, CodecOptions, PayloadDescription, Stage, corrupt
from kvstrata.codecs.keys import KeyRing
from kvstrata.errors import ConfigError, FrameError
from kvstrata.types import MissReason

_VERSION = "v1"
_NONCE_BYTES = 12
_TAG_BYTES = 16
_IDENTITY = struct.Struct("<32sIH")


class AESGCMOptions(CodecOptions, frozen=True):
    """Settings of ``aesgcm``."""

    key_file: str | None = None
    """File with the keys; the setting ``encryption_key_file``."""


class AESGCMCodec(Codec):
    """Encrypts and authenticates; reads what was written with any key of the file."""

    name: ClassVar[str] = "aesgcm"
    stage: ClassVar[Stage] = Stage.ENCRYPT
    Options: ClassVar[type[CodecOptions]] = AESGCMOptions

    def __init__(self, options: AESGCMOptions | None = None) -> None:
        """
        Raises:
            ConfigError: the key file cannot be used.
        """
        super().__init__(options)
        key_file = options.key_file if options is not None else None
        self._keys = KeyRing(key_file) if key_file else None

    @property
    def parameters(self) -> str:
        return f"{_VERSION},{self._writing_keys().writing_id}"

    def _writing_keys(self) -> KeyRing:
        if self._keys is None:
            raise ConfigError("codec 'aesgcm' needs keys: set encryption_key_file")
        return self._keys

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        return _NONCE_BYTES + what.payload_bytes + _TAG_BYTES

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        keys = self._writing_keys()
        size = self.max_encoded_bytes(what)
        into[:_NONCE_BYTES] = nonce = os.urandom(_NONCE_BYTES)
        cipher = AESGCM(keys.derive(keys.writing_id, _identity(what)))
        cipher.encrypt_into(nonce, payload, _authenticated(what, self.parameters), into[_NONCE_BYTES:size])
        return size

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        version, _, key_id = parameters.partition(",")
        if version != _VERSION:
            raise FrameError(
                MissReason.UNKNOWN_CODEC, f"codec aesgcm with parameters {parameters!r} is not known here"
            )
        if self._keys is None:
            raise FrameError(MissReason.UNDECRYPTABLE, "it is encrypted and no encryption_key_file is set")
        if key_id not in self._keys:
            raise FrameError(MissReason.UNDECRYPTABLE, f"its key {key_id!r} is not in the key file")
        if len(encoded) != self.max_encoded_bytes(what):
            raise corrupt(self.name, f"{len(encoded)} bytes for a payload of {what.payload_bytes}")
        cipher = AESGCM(self._keys.derive(key_id, _identity(what)))
        nonce = bytes(encoded[:_NONCE_BYTES])
        try:
            cipher.decrypt_into(nonce, encoded[_NONCE_BYTES:], _authenticated(what, parameters), into)
        except InvalidTag:
            raise FrameError(
                MissReason.UNDECRYPTABLE, "it was changed, or belongs to another entry"
            ) from None


def _identity(what: PayloadDescription) -> bytes:
    return _IDENTITY.pack(what.chunk_hash, what.shard, what.group)


def _authenticated(what: PayloadDescription, parameters: str) -> bytes:
    """The associated data: everything a reader goes by besides the ciphertext."""
    return msgspec.json.encode(
        (
            what.chunk_hash.hex(),
            what.shard,
            what.group,
            what.first_token,
            what.num_tokens,
            what.payload_bytes,
            what.layout.fingerprint.hex(),
            what.codec,
            what.codec_parameters,
            parameters,
        )
    )
