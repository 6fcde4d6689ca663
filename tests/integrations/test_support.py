"""What is refused, and that refusing means serving without cache."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
import torch
from simulated import expected_answer
from vllm import _custom_ops
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    HiddenStateCacheSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
)

from kvstrata.codecs.base import PayloadDescription
from kvstrata.codecs.pages import unpack, why_opaque
from kvstrata.errors import LayoutError
from kvstrata.integrations.vllm.support import is_mla, kernel_text, page_reader, why_unsupported
from kvstrata.testing.codec import describe_kv, page_format

SIZES = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
FULL = FullAttentionSpec(**SIZES)
MLA = MLAAttentionSpec(**SIZES)
QUANTISED = FullAttentionSpec(**SIZES, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)


def parallel(**sizes):
    defaults = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    return SimpleNamespace(parallel_config=SimpleNamespace(**(defaults | sizes)))


def kv_config(*specs):
    groups = [KVCacheGroupSpec([f"layer.{index}"], spec) for index, spec in enumerate(specs)]
    return KVCacheConfig(8, [], groups)


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        MLA,
        QUANTISED,
        FullAttentionSpec(**SIZES, page_size_padded=8192),
        UniformTypeKVCacheSpecs(16, {"a": FULL, "b": FullAttentionSpec(**(SIZES | {"num_kv_heads": 4}))}),
    ],
)
def test_known_kinds_are_supported(spec):
    assert why_unsupported(parallel(), kv_config(spec)) == ""


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(**SIZES, sliding_window=128),
        ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=128),
        CrossAttentionSpec(**SIZES),
        EncoderOnlyAttentionSpec(**SIZES),
        SinkFullAttentionSpec(**SIZES, sink_len=4),
        RSWASpec(**SIZES, rswa_window=4),
        HiddenStateCacheSpec(**SIZES),
        MambaSpec(block_size=16, shapes=((2, 2),), dtypes=(torch.float32,)),
        FullAttentionSpec(**SIZES, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD),
        FullAttentionSpec(**SIZES, non_causal=True),
        MLAAttentionSpec(**SIZES, cache_role=SparseCacheRole.INDEXER),
        MLAAttentionSpec(**SIZES, tokens_per_state=4),
        UniformTypeKVCacheSpecs(16, {"a": FULL, "b": SinkFullAttentionSpec(**SIZES, sink_len=4)}),
    ],
)
def test_other_kinds_are_refused(spec):
    reason = why_unsupported(parallel(), kv_config(spec))
    assert reason
    assert "\n" not in reason


def test_several_groups_are_refused_by_name():
    reason = why_unsupported(parallel(), kv_config(FULL, SlidingWindowSpec(**SIZES, sliding_window=128)))
    assert (
        reason == "the model has 2 KV cache groups (FullAttentionSpec, SlidingWindowSpec); one is supported"
    )


def test_context_parallelism_is_refused():
    assert "context parallelism" in why_unsupported(parallel(decode_context_parallel_size=2), kv_config(FULL))
    assert "context parallelism" in why_unsupported(
        parallel(prefill_context_parallel_size=2), kv_config(FULL)
    )


def test_host_resident_groups_are_refused():
    config = kv_config(FULL)
    config.kv_cache_groups[0].host_resident = True
    assert why_unsupported(parallel(), config)


def test_mla_is_recognised():
    assert is_mla(kv_config(MLA))
    assert not is_mla(kv_config(FULL))


def layers(name="FLASH_ATTN", **attributes):
    layer = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: name), **attributes)
    compilation = SimpleNamespace(static_forward_context={"a": layer})
    return SimpleNamespace(compilation_config=compilation)


def test_the_kernel_text_names_backend_packing_and_scales():
    assert kernel_text(layers("CPU_ATTN", isa="amx"), ["a"]) == "CPU_ATTN/amx"
    assert kernel_text(layers("CPU_ATTN", isa="amx"), ["a"]) != kernel_text(
        layers("CPU_ATTN", isa="vec"), ["a"]
    )
    plain = kernel_text(layers(_k_scale_float=1.0, _v_scale_float=1.0), ["a"])
    assert plain == kernel_text(layers(), ["a"])
    assert plain != kernel_text(layers(_k_scale_float=0.5, _v_scale_float=1.0), ["a"])


def test_layers_that_do_not_say_enough_are_refused():
    with pytest.raises(LayoutError, match="layer b"):
        kernel_text(layers(), ["b"])
    with pytest.raises(LayoutError, match="packs a page"):
        kernel_text(layers("CPU_ATTN"), ["a"])
    with pytest.raises(LayoutError, match="CPU_MLA"):
        kernel_text(layers("CPU_MLA"), ["a"])


def read_page(*layer, spec=FULL, dtype=torch.bfloat16):
    """How a page of 2 heads, 32 tokens, 32 dims is said to unpack."""
    reader = page_reader(layers(*layer[:1], isa="".join(layer[1:])), kv_config(spec), ["a"])
    return reader if isinstance(reader, str) else reader(dtype, (2, 32, 64), (2048, 64, 1))


def test_pages_of_vllms_cpu_attention_are_read_off_its_kernel():
    """The kernel's own order, and what it puts where: a token's keys and values come back."""
    format_ = read_page("CPU_ATTN", "vec")
    layout = msgspec.structs.replace(describe_kv(32).layout, page_bytes=(8192,), pages=format_)
    assert why_opaque(layout) == ""
    keys, values = torch.randn(2, 32, 2, 32).to(torch.bfloat16)
    page = torch.zeros(1, 2, 64, 32, dtype=torch.bfloat16)
    caches = page.chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(keys, values, *caches, torch.arange(32), "vec")
    what = PayloadDescription(layout, 32, 8192, "bfloat16")
    unpacked = unpack(memoryview(page.view(torch.uint8).numpy()).cast("B"), what)
    assert unpacked[0].tobytes() == torch.stack([keys, values]).view(torch.uint8).numpy().tobytes()


def test_plain_pages_are_read_off_their_strides():
    assert read_page("FLASH_ATTN") == page_format("heads", 32, 2, 32)


@pytest.mark.parametrize(
    ("reason", "backend", "changes"),
    [
        ("MLA keeps one latent", "FLASH_ATTN", {"spec": MLA}),
        ("quantises its KV cache itself", "FLASH_ATTN", {"spec": QUANTISED}),
        ("differ in size", "FLASH_ATTN", {"spec": FullAttentionSpec(**SIZES, head_size_v=16)}),
        ("backend ROCM_ATTN", "ROCM_ATTN", {}),
        ("Invalid ISA type: new", "CPU_ATTN/new", {}),
        ("elements are uint8", "CPU_ATTN/vec", {"dtype": torch.uint8}),
    ],
)
def test_pages_that_cannot_be_read_are_said(reason, backend, changes):
    assert reason in read_page(*backend.split("/"), **changes)


def test_an_unknown_kind_is_served_without_cache(make_engine, client, log):
    engine = make_engine(spec_class=RSWASpec, spec_arguments={"rswa_window": 4})
    prompt = list(range(50))
    assert engine.ask("a", prompt, 3) == expected_answer(prompt, 3)
    assert engine.scheduler.reset_prefix_cache(reset_connector=True)
    assert engine.ask("b", prompt, 3) == expected_answer(prompt, 3)
    assert engine.num_computed == 2 * 52
    assert client.stats()["l1"]["entries"] == 0
    warnings = [message for message in log() if "caches nothing" in message]
    assert len(warnings) == 1
    assert "RSWASpec is not supported" in warnings[0]


def test_a_layout_that_is_not_understood_is_served_without_cache(make_engine, client, log, monkeypatch):
    monkeypatch.setattr("simulated.Layer.isa", "")
    engine = make_engine()
    prompt = list(range(50))
    for name in "ab":
        assert engine.ask(name, prompt, 3) == expected_answer(prompt, 3)
    assert sum("packs a page" in message for message in log()) == 1
