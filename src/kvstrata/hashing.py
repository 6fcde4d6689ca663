"""Token ids and extra keys -> chained chunk hashes.

``root   = SHA-256(version, namespace, cache_salt)``
``hash_i = SHA-256(hash_{i-1}, tokens of block i as little-endian u32, extra keys of block i)``

Deterministic on every process and host; no environment variable takes part.
"""

from __future__ import annotations

import array
import hashlib
import struct
import sys
from collections.abc import Sequence

from kvstrata.types import HASH_BYTES, SALT_ID_BYTES, Namespace, Piece, Prefix

HASH_VERSION = 1

_sha256 = hashlib.sha256


def root_hash(namespace: Namespace, cache_salt: str = "") -> bytes:
    """The start of every chain of a namespace and a tenant."""
    salt = cache_salt.encode()
    return _sha256(
        b"kvstrata chain %d\0" % HASH_VERSION + namespace.fingerprint + len(salt).to_bytes(4, "little") + salt
    ).digest()


def salt_id(cache_salt: str) -> bytes:
    """What stands for a tenant's salt where quotas are kept: 16 bytes that do not tell it; empty without a salt."""
    if not cache_salt:
        return b""
    return _sha256(b"kvstrata salt 1\0" + cache_salt.encode()).digest()[:SALT_ID_BYTES]


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian u32.

    Raises:
        OverflowError: a token id is negative or does not fit in 32 bits.
    """
    packed = array.array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


class PrefixHasher:
    """Hashes one growing token sequence block by block. Not thread-safe.

    Extra keys of a block are bytes that change its KV besides the tokens (an image, an adapter);
    the caller encodes them, unambiguously.
    """

    def __init__(self, namespace: Namespace, cache_salt: str = "") -> None:
        """For one sequence of a namespace and a tenant."""
        self.root = root_hash(namespace, cache_salt)
        self.block_size = namespace.layout.block_size
        self.salt_id = salt_id(cache_salt)
        self._hashes = bytearray()
        self._last = self.root

    @property
    def num_blocks(self) -> int:
        return len(self._hashes) // HASH_BYTES

    def extend(self, tokens: Sequence[int], extra_keys: Sequence[bytes] | None = None) -> None:
        """Hash the full blocks of ``tokens`` that are new.

        Args:
            tokens: the whole sequence so far; what was hashed before is not read again.
            extra_keys: for each new full block its extra keys, or None when no block has any.
        """
        first = self.num_blocks
        count = len(tokens) // self.block_size - first
        if count <= 0:
            return
        packed = token_bytes(tokens[first * self.block_size : (first + count) * self.block_size])
        # Unpacking, a list and one join instead of slices of a growing buffer: 15 % of a hash chain's time.
        blocks = struct.iter_unpack(f"{4 * self.block_size}s", packed)
        last, hashes = self._last, []
        if extra_keys is None:
            for (block,) in blocks:
                last = _sha256(last + block).digest()
                hashes.append(last)
        else:
            for (block,), extra_key in zip(blocks, extra_keys, strict=True):
                last = _sha256(last + block + extra_key).digest()
                hashes.append(last)
        self._hashes += b"".join(hashes)
        self._last = last

    def block_hash(self, index: int) -> bytes:
        """The hash after block ``index``; the root for -1."""
        if index < 0:
            return self.root
        return bytes(self._hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES])

    def remainder_hash(self, tokens: Sequence[int], extra_key: bytes = b"") -> bytes:
        """The hash after the partly filled last block of ``tokens``; empty when there is none."""
        start = len(tokens) // self.block_size * self.block_size
        if start == len(tokens):
            return b""
        previous = self.block_hash(start // self.block_size - 1)
        rest = token_bytes(tokens[start:])
        head = b"remainder\0" + len(rest).to_bytes(4, "little")
        return _sha256(head + previous + rest + extra_key).digest()

    def prefix(self, tokens: Sequence[int], remainder_extra_key: bytes = b"") -> Prefix:
        """What a lookup of ``tokens`` sends. The full blocks must have been hashed (:meth:`extend`)."""
        count = len(tokens) // self.block_size
        return Prefix(
            block_hashes=bytes(self._hashes[: count * HASH_BYTES]),
            remainder_hash=self.remainder_hash(tokens, remainder_extra_key),
            num_tokens=len(tokens),
            root=self.root,
            salt_id=self.salt_id,
        )


def tokens_hash(tokens: Sequence[int]) -> bytes:
    """SHA-256 of a piece's tokens alone, kept in the frame for reuse at other positions."""
    return _sha256(b"kvstrata tokens 1\0" + token_bytes(tokens)).digest()


def full_chunks(hasher: PrefixHasher, chunk_size: int, first_chunk: int, end_chunk: int) -> list[Piece]:
    """The full chunks ``first_chunk .. end_chunk - 1`` of a hashed sequence."""
    per_chunk = chunk_size // hasher.block_size
    return [
        Piece(
            chunk_hash=hasher.block_hash((index + 1) * per_chunk - 1),
            parent_hash=hasher.block_hash(index * per_chunk - 1),
            first_token=index * chunk_size,
            num_tokens=chunk_size,
            salt_id=hasher.salt_id,
        )
        for index in range(first_chunk, end_chunk)
    ]


def tail_pieces(prefix: Prefix, block_size: int, chunk_size: int) -> list[Piece]:
    """What lies after the last full chunk of a finished sequence: a tail, a remainder, both or none."""
    pieces = []
    chunk_start = prefix.num_tokens // chunk_size * chunk_size
    block_end = prefix.num_blocks * block_size
    if block_end > chunk_start:
        pieces.append(
            Piece(
                chunk_hash=prefix.block_hash(prefix.num_blocks - 1),
                parent_hash=prefix.block_hash(chunk_start // block_size - 1),
                first_token=chunk_start,
                num_tokens=block_end - chunk_start,
                salt_id=prefix.salt_id,
            )
        )
    if prefix.remainder_hash:
        pieces.append(
            Piece(
                chunk_hash=prefix.remainder_hash,
                parent_hash=prefix.block_hash(prefix.num_blocks - 1),
                first_token=block_end,
                num_tokens=prefix.num_tokens - block_end,
                salt_id=prefix.salt_id,
            )
        )
    return pieces
