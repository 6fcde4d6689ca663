"""Real KV to measure codecs on: what the small model computes for natural text."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.testing.model import ModelError, smollm2, tokenize
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
    """KV of ``num_chunks`` different passages in bf16, in pages of 128 tokens as vLLM has them on a CPU: per layer
    and block ``[heads][tokens][keys then values of one head]``.

    Needs torch and transformers, the memory of a 135M model, and some seconds per chunk.

    Raises:
        ConfigError: they are not there, or the model cannot be made.
    """
    try:
        import torch  # noqa: PLC0415  (takes seconds)
        from transformers import AutoModelForCausalLM  # noqa: PLC0415
        from transformers.utils import logging  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"real KV needs torch and the demo extra ({error.name} is missing): pip install torch 'kvstrata[demo]'"
        ) from None
    try:
        directory = smollm2(cache_dir.resolve())
    except ModelError as error:
        raise ConfigError(str(error)) from None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    payloads = []
    for number in range(num_chunks):
        text = natural_text(CHUNK_TOKENS * _CHARACTERS_PER_TOKEN, start=number * _TOPICS_APART)
        tokens = torch.tensor([tokenize(directory, text)[:CHUNK_TOKENS]])
        with torch.no_grad():
            cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        layers = []
        for layer in cache.layers:
            both = torch.cat([layer.keys[0], layer.values[0]], dim=-1)  # heads, tokens, 2 * head size
            heads, _, content = both.shape
            blocks = both.reshape(heads, -1, _BLOCK_TOKENS, content).permute(1, 0, 2, 3)
            layers.append(blocks.contiguous())
        payloads.append(torch.stack(layers).view(torch.uint8).numpy().tobytes())
    page_bytes = tuple(_BLOCK_TOKENS * heads * content * 2 for _ in layers)
    kernel_format = f"bench page {heads}x{_BLOCK_TOKENS}x{content}"
    pages = _page_format(heads, content)
    return RealKV(KVLayout(_BLOCK_TOKENS, page_bytes, "bfloat16", kernel_format, pages), tuple(payloads))


def _page_format(heads: int, content: int) -> PageFormat:
    tokens, heads_digits = ((_BLOCK_TOKENS, content),), ((heads, _BLOCK_TOKENS * content),)
    keys, values = (PageOrder(at, tokens, heads_digits, ((content // 2, 1),)) for at in (0, content // 2))
    return PageFormat(keys, values)
