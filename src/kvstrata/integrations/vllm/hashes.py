"""A vLLM request -> the hashes of its blocks, extra keys included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from kvstrata.hashing import PrefixHasher, full_chunks, tail_pieces, tokens_hash
from kvstrata.types import Namespace, Piece, Prefix

if TYPE_CHECKING:
    from vllm.v1.request import Request

_KNOWN_KINDS = frozenset({"lora", "mm", "prompt_embeds"})


class UnknownExtraKeyError(Exception):
    """vLLM names something that changes a block's KV and that this version does not know."""


class RequestHashes:
    """The growing hash chain of one request. Not thread-safe.

    Methods raise :class:`UnknownExtraKeyError` when the request cannot be cached.
    """

    def __init__(self, request: Request, namespace: Namespace) -> None:
        self._request = request
        self._namespace = namespace
        self._block_size = namespace.layout.block_size
        self._hasher = PrefixHasher(namespace, request.cache_salt or "")
        self._mm_index = 0
        # What vLLM turns into extra keys; a request without any needs no look at single blocks.
        self._plain = (
            not request.lora_request
            and not request.mm_features
            and getattr(request, "prompt_embeds", None) is None
        )

    def prefix(self, num_tokens: int) -> Prefix:
        """The hashes of the first ``num_tokens`` tokens."""
        self._extend(num_tokens)
        start = num_tokens // self._block_size * self._block_size
        extra = b""
        if not self._plain and start < num_tokens:
            extra, _ = self._extra_key(start, num_tokens, 0)
        return self._hasher.prefix(self._request.all_token_ids[:num_tokens], extra)

    def chunks(self, first: int, end: int) -> list[Piece]:
        """The full chunks ``first .. end - 1``."""
        self._extend(end * self._namespace.chunk_size)
        pieces = full_chunks(self._hasher, self._namespace.chunk_size, first, end)
        return [self._with_tokens_hash(piece) for piece in pieces]

    def tail(self, num_tokens: int) -> list[Piece]:
        """What follows the last full chunk of the first ``num_tokens`` tokens."""
        pieces = tail_pieces(self.prefix(num_tokens), self._block_size, self._namespace.chunk_size)
        return [self._with_tokens_hash(piece) for piece in pieces]

    def _with_tokens_hash(self, piece: Piece) -> Piece:
        tokens = self._request.all_token_ids[piece.first_token : piece.first_token + piece.num_tokens]
        return msgspec.structs.replace(piece, tokens_hash=tokens_hash(tokens))

    def _extend(self, num_tokens: int) -> None:
        first, end = self._hasher.num_blocks, num_tokens // self._block_size
        if first >= end:
            return
        tokens = self._request.all_token_ids[: end * self._block_size]
        if self._plain:
            self._hasher.extend(tokens)
            return
        keys, index = [], self._mm_index
        for block in range(first, end):
            key, index = self._extra_key(block * self._block_size, (block + 1) * self._block_size, index)
            keys.append(key)
        self._hasher.extend(tokens, keys)
        self._mm_index = index

    def _extra_key(self, start: int, end: int, mm_index: int) -> tuple[bytes, int]:
        keys, next_index = generate_block_hash_extra_keys(self._request, start, end, mm_index)
        return encode_extra_keys(keys), next_index


def encode_extra_keys(keys: tuple[Any, ...] | None) -> bytes:
    """vLLM's extra keys of one block as bytes that no other keys have.

    The cache salt is left out: it is part of the chain's root.

    Raises:
        UnknownExtraKeyError: a key of a kind that is not known, or with parts that have no unambiguous bytes.
    """
    kept = []
    for key in keys or ():
        if not isinstance(key, tuple) or not key or key[0] not in _KNOWN_KINDS | {"cache_salt"}:
            raise UnknownExtraKeyError(f"unknown extra key {key!r:.100}")
        if key[0] == "cache_salt":
            continue
        if not all(isinstance(part, str | int | bytes) for part in key):
            raise UnknownExtraKeyError(f"unknown parts in extra key {key!r:.100}")
        kept.append(key)
    return msgspec.msgpack.encode(kept) if kept else b""
