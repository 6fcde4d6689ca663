"""What the config.json of well-known models says of their KV; nothing else of it is kept here."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

CACHED: dict[str, Config] = {
    "Llama-3.1-8B": {
        "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_size": 4096, "torch_dtype": "bfloat16",
    },
    "Llama-3.1-70B": {
        "model_type": "llama", "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "hidden_size": 8192, "torch_dtype": "bfloat16",
    },
    "Llama-2-7B": {
        "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
        "torch_dtype": "float16",
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "hidden_size": 3584, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
        "torch_dtype": "bfloat16",
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_size": 4096, "head_dim": 128, "sliding_window": None, "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "hidden_size": 1024, "sliding_window": None, "torch_dtype": "bfloat16",
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_size": 4096, "sliding_window": None, "torch_dtype": "bfloat16",
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "hidden_size": 4096, "sliding_window": None, "torch_dtype": "bfloat16",
    },
    "gemma-2b": {
        "model_type": "gemma", "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1,
        "hidden_size": 2048, "head_dim": 256, "torch_dtype": "bfloat16",
    },
    "gemma-7b": {
        "model_type": "gemma", "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "hidden_size": 3072, "torch_dtype": "bfloat16",
    },
    "phi-4": {
        "model_type": "phi3", "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
        "hidden_size": 5120, "sliding_window": None, "torch_dtype": "bfloat16",
    },
    "falcon-7b": {
        "model_type": "falcon", "num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544,
        "multi_query": True, "new_decoder_architecture": False, "torch_dtype": "bfloat16",
    },
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "torch_dtype": "float32"},
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "hidden_size": 2048, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "torch_dtype": "bfloat16",
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "torch_dtype": "bfloat16",
    },
}  # fmt: skip

NOT_CACHED: dict[str, tuple[Config, str]] = {
    "Mistral-7B-v0.1": (
        CACHED["Mistral-7B-v0.3"] | {"sliding_window": 4096},
        "a sliding window (4096 tokens)",
    ),
    "gemma-2-9b": (
        CACHED["gemma-7b"] | {"model_type": "gemma2", "sliding_window": 4096},
        "a sliding window (4096 tokens)",
    ),
    "gemma-3-4b": (
        {"model_type": "gemma3", "text_config": {**CACHED["gemma-7b"], "sliding_window": 1024}},
        "a sliding window (1024 tokens)",
    ),
    "gpt-oss-20b": (
        CACHED["Llama-3.1-8B"] | {"layer_types": ["sliding_attention", "full_attention"]},
        "layers of kind sliding_attention",
    ),
    "Jamba": (CACHED["Llama-3.1-8B"] | {"mamba_d_state": 16}, "layers that keep a state (mamba_d_state)"),
    "Qwen3-Next": (
        CACHED["Qwen3-8B"] | {"model_type": "qwen3_next", "full_attention_interval": 4},
        "layers that keep a state (full_attention_interval)",
    ),
    "Llama-4": (
        {"model_type": "llama4", "text_config": {**CACHED["Llama-3.1-8B"], "attention_chunk_size": 8192}},
        "chunked attention",
    ),
    "DeepSeek-V3.2": (CACHED["DeepSeek-V3"] | {"index_topk": 2048}, "sparse attention (index_topk)"),
    "T5": (CACHED["Llama-2-7B"] | {"is_encoder_decoder": True}, "encoder-decoder"),
}
