"""What a well-formed request must hold besides its types. Pure functions; each raises ProtocolError."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.errors import ProtocolError
from kvstrata.types import HASH_BYTES, SALT_ID_BYTES, Namespace, Piece, Prefix

MAX_SHARDS = 4096
MAX_PAGE_BYTES = 1 << 40
_MAX_POSITION = 1 << 40
_MAX_TOKENS = 1 << 31
_MAX_DTYPE = 16


def check_namespace(namespace: Namespace) -> None:
    """A namespace that keys, frames and walks can be made for."""
    layout = namespace.layout
    if layout.block_size < 1 or not layout.block_size <= namespace.chunk_size < _MAX_TOKENS:
        raise ProtocolError(f"chunks of {namespace.chunk_size} tokens in blocks of {layout.block_size}")
    if namespace.chunk_size % layout.block_size:
        raise ProtocolError(
            f"chunk size {namespace.chunk_size} is no multiple of block size {layout.block_size}"
        )
    if not 1 <= namespace.world_size <= MAX_SHARDS:
        raise ProtocolError(f"{namespace.world_size} shards; allowed are 1 to {MAX_SHARDS}")
    if any(size < 0 for size in layout.page_bytes) or not 0 < layout.block_bytes <= MAX_PAGE_BYTES:
        raise ProtocolError(f"blocks of {layout.block_bytes} bytes")
    if len(layout.dtype) > _MAX_DTYPE or not layout.dtype.isascii():
        raise ProtocolError(f"a dtype of {len(layout.dtype)} characters has no room in a frame's header")


def check_shard(namespace: Namespace, shard: int) -> None:
    """A shard of that namespace."""
    if not 0 <= shard < namespace.world_size:
        raise ProtocolError(f"shard {shard} of {namespace.world_size}")


def check_prefix(namespace: Namespace, prefix: Prefix, first_token: int = 0) -> None:
    """Hashes and number of tokens agree, and the token to begin with is one of them."""
    if not 0 <= first_token <= prefix.num_tokens:
        raise ProtocolError(f"token {first_token} of {prefix.num_tokens}")
    _check_salt_id(prefix.salt_id)
    if len(prefix.root) != HASH_BYTES or len(prefix.block_hashes) % HASH_BYTES:
        raise ProtocolError("hashes of a wrong length")
    if len(prefix.remainder_hash) not in {0, HASH_BYTES}:
        raise ProtocolError("a remainder's hash of a wrong length")
    block_size = namespace.layout.block_size
    rest = prefix.num_tokens - prefix.num_blocks * block_size
    if not (0 < rest < block_size if prefix.remainder_hash else rest == 0):
        raise ProtocolError(f"{prefix.num_blocks} blocks of {block_size} for {prefix.num_tokens} tokens")


def check_pieces(namespace: Namespace, pieces: Sequence[Piece]) -> None:
    """Pieces of sequences in that namespace."""
    for piece in pieces:
        check_hashes((piece.chunk_hash, piece.parent_hash))
        _check_salt_id(piece.salt_id)
        if len(piece.tokens_hash) not in {0, HASH_BYTES}:
            raise ProtocolError("a tokens' hash of a wrong length")
        if not 1 <= piece.num_tokens <= namespace.chunk_size or not 0 <= piece.first_token < _MAX_POSITION:
            raise ProtocolError(f"a piece of {piece.num_tokens} tokens at {piece.first_token}")


def _check_salt_id(salt_id: bytes) -> None:
    if len(salt_id) not in {0, SALT_ID_BYTES}:
        raise ProtocolError("a salt's id of a wrong length")


def check_hashes(hashes: Sequence[bytes]) -> None:
    """Each is a hash."""
    if any(len(each) != HASH_BYTES for each in hashes):
        raise ProtocolError("a hash of a wrong length")
