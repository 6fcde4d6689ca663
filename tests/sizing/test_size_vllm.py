"""The calculator's bytes are those of vLLM's own KV cache specifications."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from configs import CACHED

from kvstrata.errors import ConfigError
from kvstrata.sizing import Deployment, measure, read_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM and torch, while they are imported
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    import torch
    from vllm.config.model import ModelConfig
    from vllm.transformers_utils.config import get_config, get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, get_kv_quant_mode

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 16


def vllm_block_bytes(folder: Path, ranks: int, kv_dtype: str) -> tuple[int, bool]:
    """Bytes of a block over all layers of a rank, and whether it is MLA, as vLLM has them."""
    config = get_config(str(folder), trust_remote_code=False)
    convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(config.model_type, ModelArchConfigConvertorBase)
    shape = convertor(config, get_hf_text_config(config)).convert()
    model = SimpleNamespace(use_mla=shape.is_deepseek_mla, model_arch_config=shape)
    heads = ModelConfig.get_num_kv_heads(model, SimpleNamespace(tensor_parallel_size=ranks))
    dtype = torch.uint8 if kv_dtype == "fp8" else config.dtype
    # vLLM does not serve in float32 unless told to.
    dtype = torch.bfloat16 if dtype is torch.float32 else dtype
    kind = MLAAttentionSpec if shape.is_deepseek_mla else FullAttentionSpec
    spec = kind(
        block_size=BLOCK_SIZE,
        num_kv_heads=heads,
        head_size=shape.head_size,
        dtype=dtype,
        kv_quant_mode=get_kv_quant_mode(kv_dtype),
    )
    return spec.page_size_bytes * shape.total_num_hidden_layers, shape.is_deepseek_mla


@pytest.mark.parametrize("name", CACHED)
def test_bytes_are_those_of_vllm(name: str, tmp_path: Path) -> None:
    architecture = {"architectures": ["Anything"]}
    (tmp_path / "config.json").write_text(json.dumps(CACHED[name] | architecture))
    model = read_model(tmp_path)
    for ranks in (1, 2, 4, 16):
        for dtype in ("auto", "fp8"):
            deployment = Deployment(
                tensor_parallel_size=ranks, block_size=BLOCK_SIZE, chunk_size=256, dtype=dtype
            )
            try:
                sizes = measure(model, deployment, 1000)
            except ConfigError:
                # vLLM's models assert the same.
                assert model.num_attention_heads % ranks or model.num_kv_heads % ranks, (name, ranks)
                continue
            block_bytes, is_mla = vllm_block_bytes(tmp_path, ranks, dtype)
            assert sizes.token_bytes_per_rank * BLOCK_SIZE == block_bytes, (name, ranks, dtype)
            assert sizes.chunk_payload_bytes == block_bytes * (256 // BLOCK_SIZE)
            assert sizes.num_shards == (1 if is_mla else ranks)
