"""The values that every layer shares. All are frozen; none does I/O."""

from __future__ import annotations

import enum
import functools
import hashlib
from collections.abc import Sequence
from urllib.parse import quote, unquote

import msgspec

HASH_BYTES = 32
"""Length of a chunk hash (SHA-256)."""
SALT_ID_BYTES = 16
"""Length of what stands for a cache_salt where quotas are kept."""


class MissReason(enum.StrEnum):
    """Why tokens had to be computed. The values are metric labels."""

    ABSENT = "absent"
    EVICTED = "evicted"
    EXPIRED = "expired"
    CORRUPT = "corrupt"
    LAYOUT_MISMATCH = "layout_mismatch"
    UNKNOWN_CODEC = "unknown_codec"
    UNDECRYPTABLE = "undecryptable"
    TIER_DOWN = "tier_down"
    DEADLINE = "deadline"
    GATED = "gated"
    NO_SPACE = "no_space"
    SALT_QUOTA = "salt_quota"
    """The limit of its own cache_salt, or what is reserved for others, left no room for it."""
    CHUNK_ALIGNMENT = "chunk_alignment"
    """Less than a chunk is missing, and L1 holds another chunk in its place: one that ends later, or differs."""


FOR_OTHERS = (MissReason.LAYOUT_MISMATCH, MissReason.UNKNOWN_CODEC, MissReason.UNDECRYPTABLE)
"""Of what is whole and cannot be read here: those of a later version can, or with other libraries or keys."""


class Miss(msgspec.Struct, frozen=True):
    """A key that a tier could not deliver, and why."""

    reason: MissReason
    detail: str = ""


Digits = tuple[tuple[int, int], ...]
"""An index in a mixed radix: ``(size, stride in elements)`` of each digit, the most significant first.

One digit is a plain stride. Several say that the index is interleaved with another one: where a kernel keeps pairs
of tokens together, the lower digit of the token has size 2.
"""


class PageOrder(msgspec.Struct, frozen=True):
    """Where the keys of a page lie, or the values: the element of a token, head and dim is at ``start`` plus each
    digit times its stride, in elements from the start of the page."""

    start: int
    tokens: Digits
    heads: Digits
    dims: Digits


class PageFormat(msgspec.Struct, frozen=True):
    """How a page unpacks into tokens x heads x dims; the same for all layers."""

    keys: PageOrder
    values: PageOrder


class KVLayout(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the KV of one shard lies in its payload: ``[layer][block][page bytes]``.

    Pages are opaque: the bytes that the inference engine keeps for one block of one layer, in their
    physical order. Everything that decides what those bytes mean is part of the fingerprint.
    """

    block_size: int
    """Tokens per block."""
    page_bytes: tuple[int, ...]
    """Bytes of one block, per layer, in layer order."""
    dtype: str
    """Element type of the pages, as torch names it ("bfloat16", "uint8")."""
    kernel_format: str
    """What orders the elements inside a page: strides for plain layouts, the kernel's name otherwise."""
    pages: PageFormat | str = ""
    """The same for codecs that want to know keys from values, or why that is not known. Not part of the
    fingerprint: ``kernel_format`` decides it."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return _block_bytes(self)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens (the last one may be partly filled)."""
        return -(-num_tokens // self.block_size)

    def payload_bytes(self, num_tokens: int) -> int:
        """Bytes of the payload of a chunk, tail or remainder of ``num_tokens`` tokens."""
        return self.num_blocks(num_tokens) * self.block_bytes

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that identify this layout."""
        return _layout_fingerprint(self)


class Namespace(msgspec.Struct, frozen=True):
    """What must be equal for KV to be exchangeable, besides tokens and salt."""

    engine: str
    """The inference engine ("vllm")."""
    model_name: str
    model_fingerprint: str
    """Hex digest of the model's configuration, not only its name."""
    kv_dtype: str
    """The engine's KV cache dtype setting ("auto", "fp8")."""
    world_size: int
    """Number of shards of one chunk (1 where every rank holds the same KV, as with MLA)."""
    parallel_shape: str
    """How shards are cut, for example "tp2pp1"."""
    chunk_size: int
    """Tokens per chunk; a multiple of the block size."""
    layout: KVLayout

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_size // self.layout.block_size

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that identify this namespace; the root of every hash chain in it."""
        return _namespace_fingerprint(self)

    def key(self, chunk_hash: bytes, shard: int) -> str:
        """The readable key of one shard: ``engine@model_name@world_size@worker_id@chunk_hash``."""
        return f"{self.key_prefix}{shard}@{chunk_hash.hex()}"

    @property
    def key_prefix(self) -> str:
        """What the keys of all shards of this engine, model and world size begin with."""
        return _key_prefix(self)


# A frozen Struct has no room for cached values, and these are asked for with every chunk.


@functools.lru_cache(maxsize=256)
def _block_bytes(layout: KVLayout) -> int:
    return sum(layout.page_bytes)


@functools.lru_cache(maxsize=256)
def _layout_fingerprint(layout: KVLayout) -> bytes:
    bare = msgspec.structs.replace(layout, pages="")
    return hashlib.sha256(b"kvstrata layout 1\0" + msgspec.json.encode(bare)).digest()[:16]


@functools.lru_cache(maxsize=256)
def _namespace_fingerprint(namespace: Namespace) -> bytes:
    bare = msgspec.structs.replace(namespace, layout=msgspec.structs.replace(namespace.layout, pages=""))
    return hashlib.sha256(b"kvstrata namespace 1\0" + msgspec.json.encode(bare)).digest()


@functools.lru_cache(maxsize=256)
def _key_prefix(namespace: Namespace) -> str:
    return f"{quote_name(namespace.engine)}@{quote_name(namespace.model_name)}@{namespace.world_size}@"


def quote_name(name: str) -> str:
    """``name`` with the characters that would break a key (``@``, white space, controls) escaped."""
    return quote(name, safe="/:._-+=,~ ").replace(" ", "%20")


class ParsedKey(msgspec.Struct, frozen=True):
    """The parts of a readable key."""

    engine: str
    model_name: str
    world_size: int
    worker_id: int
    chunk_hash: bytes


def parse_key(text: str) -> ParsedKey:
    """Take a readable key apart.

    Raises:
        ValueError: ``text`` is not such a key.
    """
    parts = text.split("@")
    if len(parts) != 5 or len(parts[4]) != 2 * HASH_BYTES:
        raise ValueError(f"not a key of kvstrata: {text!r}")
    engine, model_name, world_size, worker_id, chunk_hash = parts
    return ParsedKey(
        unquote(engine), unquote(model_name), int(world_size), int(worker_id), bytes.fromhex(chunk_hash)
    )


def is_key(text: str) -> bool:
    """Whether ``text`` is a readable key of kvstrata."""
    try:
        parse_key(text)
    except ValueError:
        return False
    return True


class Piece(msgspec.Struct, frozen=True):
    """One stored unit of a sequence: a full chunk, a tail, or a remainder.

    A full chunk and a tail start at a chunk boundary and hold whole blocks. A remainder holds the last,
    partly filled block of a prompt and starts at that block's boundary.
    """

    chunk_hash: bytes
    """The chain's hash after this piece's last token."""
    parent_hash: bytes
    """The hash of the piece before it (the namespace's root for the first)."""
    first_token: int
    """Position of its first token in the sequence."""
    num_tokens: int
    tokens_hash: bytes = b""
    """SHA-256 of this piece's tokens alone, without its prefix."""
    salt_id: bytes = b""
    """Whose it is (``hashing.salt_id``); of pieces that are stored, only."""


class Prefix(msgspec.Struct, frozen=True):
    """The hashes of a token sequence, all that a lookup needs to know of it."""

    block_hashes: bytes
    """The chain's hash after each full block, ``HASH_BYTES`` each, concatenated."""
    remainder_hash: bytes
    """The chain's hash after the last, partly filled block; empty when the last block is full."""
    num_tokens: int
    root: bytes
    """The chain's start (namespace and cache salt)."""
    salt_id: bytes = b""
    """Whose it is (``hashing.salt_id``)."""

    @property
    def num_blocks(self) -> int:
        """Number of full blocks."""
        return len(self.block_hashes) // HASH_BYTES

    def block_hash(self, index: int) -> bytes:
        """The hash after block ``index``; the root for index -1."""
        if index < 0:
            return self.root
        return self.block_hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]


class Hit(msgspec.Struct, frozen=True):
    """The answer to a lookup. While ``pending``, ask again; the rest is empty until then."""

    pending: bool = False
    num_tokens: int = 0
    """Leading tokens held, all of them leased for the request when not zero."""
    pieces: tuple[Piece, ...] = ()
    offsets: tuple[tuple[int, ...], ...] = ()
    """Where payloads lie in the pool, in bytes: ``offsets[shard][piece]``."""
    pool_id: str = ""
    """The pool that the offsets refer to."""
    tokens_by_tier: dict[str, int] = {}
    """Hit tokens by the tier that supplied them ("l1", or a tier's name)."""
    miss_reason: MissReason | None = None
    """Why the lookup ended where it did; None after a full hit."""


PENDING = Hit(pending=True)
NO_HIT = Hit()


class Slot(msgspec.Struct, frozen=True):
    """Where a reserved payload goes: ``payload_bytes`` bytes at ``offset`` of the pool."""

    offset: int
    payload_bytes: int


class TierStats(msgspec.Struct, frozen=True):
    """What a tier holds, as far as it knows."""

    entries: int | None = None
    used_bytes: int | None = None
    budget_bytes: int | None = None


Buffer = bytes | bytearray | memoryview
Buffers = Sequence[memoryview]
