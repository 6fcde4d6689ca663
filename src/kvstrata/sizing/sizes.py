"""The shape of a model's KV -> bytes of a token, a chunk and a prompt in every tier, and what fits."""

from __future__ import annotations

import enum
import math

import msgspec

from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.open import spelled_codec
from kvstrata.errors import ConfigError
from kvstrata.frame import HEADER_BYTES, room_bytes
from kvstrata.hashing import tail_pieces
from kvstrata.memory.pool import slot_bytes
from kvstrata.sizing.model import KVShape
from kvstrata.tiers.redis.resp import MAX_BULK_BYTES
from kvstrata.types import HASH_BYTES, KVLayout, Prefix

_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_REDIS_STRING_BYTES = 10
"""Header and end of a long string in Redis, inside the memory that it allocates for it."""
_REDIS_PART_BYTES = 448
"""Name of a part, which has that of its frame in it twice, and what Redis keeps for it."""
_REDIS_ENTRY_BYTES = 1024
"""Both names, the metadata and Redis' tables for them: 700 to 900 bytes were measured."""


class Tier(enum.StrEnum):
    """Where KV is kept, by how room is counted there."""

    L1 = "l1"
    DISK = "disk"
    REDIS = "redis"


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """How the model is served and its KV stored."""

    tensor_parallel_size: int = 1
    block_size: int = 16
    """Tokens per page of vLLM: 16 on GPUs, 128 on CPUs."""
    chunk_size: int = 256
    """Tokens; what is no multiple of the block size is raised to one, as the connector does."""
    dtype: str = "auto"
    """Element type of the KV (vLLM's ``--kv-cache-dtype``); auto is that of the model."""
    max_value_bytes: int = MAX_BULK_BYTES
    """The Redis tier's option: larger frames are stored in parts."""
    codec: str = "naive"
    """Of disk and Redis; L1 holds KV as it is."""
    codec_ratio: float = 1.0
    """How much smaller the codec makes KV, as ``kvstrata bench codec`` measures it; 1 is the worst case."""


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """A tier of a given size, and what fits into it. All ranks' shards are counted."""

    tier: Tier
    size_bytes: int
    chunk_bytes: int
    """What one chunk takes there."""
    prompt_bytes: int
    """What one prompt takes there, its tail and remainder included."""
    tokens: int
    """In whole chunks."""
    prompts: int
    """Whole ones that share nothing."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. Bytes of the KV itself first; then what a chunk takes with headers and rounding."""

    model: KVShape
    deployment: Deployment
    """As asked for, with the chunk size and the element type that result."""
    num_shards: int
    """Parts of a chunk that are stored: one per rank, one in all with MLA."""
    kv_heads_per_rank: int
    prompt_tokens: int
    token_bytes_per_rank: int
    token_bytes: int
    """All that is stored of a token."""
    chunk_payload_bytes: int
    """One rank's."""
    chunk_slot_bytes: int
    """What that takes of L1."""
    chunk_frame_bytes: int
    """What that takes on disk."""
    chunk_redis_bytes: int
    rooms: tuple[Room, ...]


def measure(
    model: KVShape, deployment: Deployment, prompt_tokens: int, tiers: dict[Tier, int] | None = None
) -> Sizes:
    """Sizes of ``model`` as deployed, and what fits into ``tiers`` of so many bytes.

    Raises:
        ConfigError: it cannot be deployed so.
        PluginError: there is no such codec.
    """
    heads = _heads_per_rank(model, deployment.tensor_parallel_size)
    dtype = model.dtype if deployment.dtype == "auto" else deployment.dtype
    if dtype not in _ELEMENT_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not allowed: expected auto, {', '.join(_ELEMENT_BYTES)}")
    if not deployment.codec_ratio >= 1:
        raise ConfigError(f"a codec ratio of {deployment.codec_ratio:g} is not allowed: expected 1 or more")
    block_size = deployment.block_size
    chunk_size = -(-deployment.chunk_size // block_size) * block_size
    token_layer_bytes = heads * model.token_elements * _ELEMENT_BYTES[dtype]
    layout = KVLayout(
        block_size=block_size,
        page_bytes=(block_size * token_layer_bytes,) * model.num_layers,
        dtype=dtype if _ELEMENT_BYTES[dtype] > 1 else "uint8",
        kernel_format="",
    )
    num_shards = 1 if model.mla else deployment.tensor_parallel_size
    stored = _Stored(layout, deployment)
    pieces = [chunk_size] * (prompt_tokens // chunk_size) + _last_pieces(
        prompt_tokens, block_size, chunk_size
    )

    def room(tier: Tier, size_bytes: int) -> Room:
        chunk_bytes = num_shards * stored.piece_bytes(tier, chunk_size)
        prompt_bytes = num_shards * sum(stored.piece_bytes(tier, tokens) for tokens in pieces)
        return Room(
            tier=tier,
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            prompt_bytes=prompt_bytes,
            tokens=size_bytes // chunk_bytes * chunk_size,
            prompts=size_bytes // prompt_bytes,
        )

    return Sizes(
        model=model,
        deployment=msgspec.structs.replace(deployment, chunk_size=chunk_size, dtype=dtype),
        num_shards=num_shards,
        kv_heads_per_rank=heads,
        prompt_tokens=prompt_tokens,
        token_bytes_per_rank=token_layer_bytes * model.num_layers,
        token_bytes=token_layer_bytes * model.num_layers * num_shards,
        chunk_payload_bytes=layout.payload_bytes(chunk_size),
        chunk_slot_bytes=stored.piece_bytes(Tier.L1, chunk_size),
        chunk_frame_bytes=stored.piece_bytes(Tier.DISK, chunk_size),
        chunk_redis_bytes=stored.piece_bytes(Tier.REDIS, chunk_size),
        rooms=tuple(room(tier, size_bytes) for tier, size_bytes in (tiers or {}).items()),
    )


def _heads_per_rank(model: KVShape, ranks: int) -> int:
    """As vLLM divides them: at least one, repeated where there are more ranks than KV heads."""
    if model.num_attention_heads % ranks:
        raise ConfigError(
            f"{model.num_attention_heads} attention heads do not divide among {ranks} ranks; vLLM refuses that"
        )
    if model.mla:
        return 1
    if model.num_kv_heads % ranks and ranks % model.num_kv_heads:
        raise ConfigError(
            f"{model.num_kv_heads} KV heads do not divide among {ranks} ranks; vLLM refuses that"
        )
    return max(1, model.num_kv_heads // ranks)


def _last_pieces(num_tokens: int, block_size: int, chunk_size: int) -> list[int]:
    """Tokens of the tail and the remainder behind a prompt's last full chunk."""
    rest = num_tokens % chunk_size
    prefix = Prefix(
        bytes(HASH_BYTES * (rest // block_size)), bytes(rest % block_size), rest, bytes(HASH_BYTES)
    )
    return [piece.num_tokens for piece in tail_pieces(prefix, block_size, chunk_size)]


class _Stored:
    """What one rank's part of a piece takes."""

    def __init__(self, layout: KVLayout, deployment: Deployment) -> None:
        self._layout = layout
        self._ratio = deployment.codec_ratio
        self._max_value_bytes = deployment.max_value_bytes
        self._codec = spelled_codec(deployment.codec)
        if self._ratio != 1 and self._codec.passthrough:
            raise ConfigError(f"codec {self._codec.name} makes nothing smaller: leave --codec-ratio out")

    def piece_bytes(self, tier: Tier, num_tokens: int) -> int:
        payload_bytes = self._layout.payload_bytes(num_tokens)
        if tier is Tier.L1:
            return slot_bytes(room_bytes(payload_bytes))
        what = PayloadDescription(self._layout, num_tokens, payload_bytes, self._layout.dtype)
        frame_bytes = HEADER_BYTES + math.ceil(self._codec.max_encoded_bytes(what) / self._ratio)
        return frame_bytes if tier is Tier.DISK else redis_bytes(frame_bytes, self._max_value_bytes)


def redis_bytes(frame_bytes: int, max_value_bytes: int) -> int:
    """What a frame takes of ``maxmemory``, in parts where it is larger than ``max_value_bytes``.

    Redis' allocator (jemalloc) has four sizes for each power of two: a value just above 32 MiB takes 40.
    """
    whole, rest = divmod(frame_bytes, max_value_bytes)
    if whole == 0 or (whole == 1 and not rest):
        return _allocated(frame_bytes) + _REDIS_ENTRY_BYTES
    parts_bytes = whole * _allocated(max_value_bytes) + (_allocated(rest) if rest else 0)
    return parts_bytes + _REDIS_ENTRY_BYTES + (whole + bool(rest)) * _REDIS_PART_BYTES


def _allocated(value_bytes: int) -> int:
    needed = value_bytes + _REDIS_STRING_BYTES
    step = 1 << max(4, (needed - 1).bit_length() - 3)
    return -(-needed // step) * step
