"""Real KV to measure codecs on: what the small model computes for natural text."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvstrata.bench.small_model import KV, SmallModel
from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.pages import pack
from kvstrata.testing.text import natural_text
from kvstrata.types import KVLayout, PageFormat, PageOrder

CHUNK_TOKENS = 256
_BLOCK_TOKENS = 128
_CHARACTERS_PER_TOKEN = 6
_TOPICS_APART = 7


class RealKV(msgspec.Struct, frozen=True):
    """Payloads of full chunks, and the layout of all of them."""

    layout: KVLayout
    payloads: tuple[bytes, ...]


def real_kv(cache_dir: Path, num_chunks: int) -> RealKV:
    """KV of ``num_chunks`` different passages in bf16.

    Needs torch and transformers, the memory of a 135M model, and some seconds per chunk.

    Raises:
        ConfigError: they are not there, or the model cannot be made.
    """
    model = SmallModel(cache_dir)
    payloads = []
    for number in range(num_chunks):
        text = natural_text(CHUNK_TOKENS * _CHARACTERS_PER_TOKEN, start=number * _TOPICS_APART)
        kv = model.kv(model.tokenize(text)[:CHUNK_TOKENS])
        layout = page_layout(kv)
        payload = bytearray(layout.payload_bytes(CHUNK_TOKENS))
        pack(kv, PayloadDescription(layout, CHUNK_TOKENS, len(payload), layout.dtype), memoryview(payload))
        payloads.append(bytes(payload))
    return RealKV(layout, tuple(payloads))


def page_layout(kv: KV) -> KVLayout:
    """Pages of 128 tokens as vLLM has them on a CPU: per layer and block ``[heads][tokens][keys then values]``."""
    layers, _, _, heads, dims = kv.shape
    content = 2 * dims
    of_token, of_head = ((_BLOCK_TOKENS, content),), ((heads, _BLOCK_TOKENS * content),)
    keys, values = (PageOrder(start, of_token, of_head, ((dims, 1),)) for start in (0, dims))
    return KVLayout(
        block_size=_BLOCK_TOKENS,
        page_bytes=(_BLOCK_TOKENS * heads * content * kv.itemsize,) * layers,
        dtype="bfloat16",
        kernel_format=f"bench page {heads}x{_BLOCK_TOKENS}x{content}",
        pages=PageFormat(keys, values),
    )
