"""Which models and engine configurations this version caches. Everything else is served without cache."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from vllm import _custom_ops
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupRole,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
)

from kvstrata.device.unpack import PageReader, by_kernel, by_strides
from kvstrata.errors import LayoutError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Exact types: a subclass may keep something else in a page, or drop pages that the scheduler counts on.
_KNOWN_SPECS = (FullAttentionSpec, MLAAttentionSpec)
_KNOWN_QUANTISATION = (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)
# The reference implementation of MLA on CPU cannot continue from a cached prefix; vLLM turns prefix caching
# and chunked prefill off with it.
_NO_PREFIX_BACKENDS = frozenset({"CPU_MLA"})
# Backends that split a page's content into a token's keys, then its values, of one head.
_PLAIN_BACKENDS = frozenset({"FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN"})


def why_unsupported(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Why nothing can be cached here, in one line; empty when it can."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism (dcp or pcp > 1) is not supported"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(spec).__name__ for group in groups for spec in _specs(group.kv_cache_spec)})
        return f"the model has {len(groups)} KV cache groups ({', '.join(kinds)}); one is supported"
    group = groups[0]
    if group.host_resident or not group.enable_kv_transfer or group.role is not KVCacheGroupRole.DEFAULT:
        return "its KV cache is not meant to be transferred"
    return next((reason for spec in _specs(group.kv_cache_spec) if (reason := _why_not_spec(spec))), "")


def _specs(spec: KVCacheSpec) -> Iterable[KVCacheSpec]:
    return spec.kv_cache_specs.values() if isinstance(spec, UniformTypeKVCacheSpecs) else (spec,)


def _why_not_spec(spec: KVCacheSpec) -> str:
    if type(spec) not in _KNOWN_SPECS:
        return f"KV cache kind {type(spec).__name__} is not supported"
    if spec.kv_quant_mode not in _KNOWN_QUANTISATION:
        return f"KV cache quantisation {spec.kv_quant_mode.name} is not supported"
    if spec.tokens_per_state != 1:
        return f"KV cache with {spec.tokens_per_state} tokens per state is not supported"
    if spec.non_causal:
        return "attention that looks ahead (non-causal) has no reusable prefixes"
    if isinstance(spec, MLAAttentionSpec) and (
        spec.cache_role is not SparseCacheRole.SPARSE or spec.non_causal_multi_token_decode
    ):
        return "this kind of MLA is not supported"
    return ""


def is_mla(kv_cache_config: KVCacheConfig) -> bool:
    """Whether every tensor-parallel rank holds the same KV."""
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in _specs(group.kv_cache_spec)]
    return bool(specs) and all(isinstance(spec, MLAAttentionSpec) for spec in specs)


def kernel_text(vllm_config: VllmConfig, layer_names: Iterable[str]) -> str:
    """What decides, besides strides, how the bytes of a page are to be read.

    The attention backend, its packing on CPU (``amx``, ``vec`` ...), the scales of a quantised cache. Called
    when the layers are built.

    Raises:
        LayoutError: a layer does not say, or cannot continue from loaded KV.
    """
    context = vllm_config.compilation_config.static_forward_context
    backends, isas, scales = set(), set(), []
    for name in layer_names:
        layer = context.get(name)
        if layer is None or not hasattr(layer, "get_attn_backend"):
            raise LayoutError(f"layer {name}: vLLM does not say which attention backend it has")
        backends.add(layer.get_attn_backend().get_name())
        isas.add(str(getattr(layer, "isa", "")))
        scales.append((getattr(layer, "_k_scale_float", 1.0), getattr(layer, "_v_scale_float", 1.0)))
    if refused := backends & _NO_PREFIX_BACKENDS:
        raise LayoutError(f"attention backend {', '.join(refused)} cannot continue from a cached prefix")
    if "CPU_ATTN" in backends and isas == {""}:
        raise LayoutError("vLLM does not say how its CPU attention packs a page")
    text = f"{'+'.join(sorted(backends))}/{'+'.join(sorted(isas))}"
    if any(pair != (1.0, 1.0) for pair in scales):
        text += f" scales {scales}"
    return text


def page_reader(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, layer_names: Iterable[str]
) -> PageReader | str:
    """What tells keys from values in a page, or why nothing can. For layers that :func:`kernel_text` accepts."""
    specs = [spec for group in kv_cache_config.kv_cache_groups for spec in _specs(group.kv_cache_spec)]
    if is_mla(kv_cache_config):
        return "MLA keeps one latent vector per token, no keys and values"
    if any(spec.kv_quant_mode is not KVQuantMode.NONE for spec in specs):
        return "the inference engine quantises its KV cache itself"
    if any(spec.head_size_v != spec.head_size for spec in specs):
        return "its keys and values differ in size"
    context = vllm_config.compilation_config.static_forward_context
    layers = [context[name] for name in layer_names]
    backends = {layer.get_attn_backend().get_name() for layer in layers}
    if backends == {"CPU_ATTN"} and len(isas := {str(layer.isa) for layer in layers}) == 1:
        return by_kernel(partial(_write_page, isas.pop()))
    if backends <= _PLAIN_BACKENDS:
        return by_strides
    return f"how attention backend {'+'.join(sorted(backends))} arranges a page is not known"


def _write_page(isa: str, keys: torch.Tensor, values: torch.Tensor, page: torch.Tensor) -> None:
    """What vLLM's CPU attention does with the keys and values of one block."""
    tokens, heads, dims = keys.shape
    key_cache, value_cache = page.view(1, heads, 2 * tokens, dims).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, torch.arange(tokens), isa)
