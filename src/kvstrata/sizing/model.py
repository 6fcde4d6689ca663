"""A model's ``config.json`` -> what vLLM keeps for each token.

The rules are those of vLLM 0.32 (``transformers_utils/model_arch_config_convertor.py``,
``v1/kv_cache_interface.py``), which the tests compare with. What the connector serves without cache (sliding
windows, Mamba, hybrids, sparse attention) is refused here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvstrata.errors import ConfigError

_MAX_FILE_BYTES = 16 << 20
_MAX_NUMBER = 1 << 20
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
# Heads that are not hidden_size / heads and that config.json may leave out: the defaults of transformers.
_DEFAULT_HEAD_SIZE = {"gemma": 256, "qwen3": 128, "qwen3_moe": 128}
_DEFAULT_SLIDING_WINDOW = {"mistral": 4096}
# Only models with layers that keep a state instead of KV have these keys.
_STATE_KEYS = (
    "ssm_cfg", "ssm_config", "state_size", "mamba_d_state", "hybrid_override_pattern", "layers_block_type",
    "attn_type_list", "full_attention_interval", "linear_attn_config", "attn_layer_period", "block_types",
)  # fmt: skip
_SPARSE_KEYS = ("compress_ratios", "index_topk")
_DTYPES = {"float16", "bfloat16", "float32"}


class KVShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a model keeps for each token, before it is divided among ranks."""

    model_type: str
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    """1 with MLA: one latent vector for all heads."""
    head_size: int
    """Elements of one head's key; with MLA of the latent vector and the rotary part."""
    mla: bool
    """Keys and values are one vector, and every tensor-parallel rank holds the same."""
    dtype: str
    """Of the weights, and of the KV unless vLLM is told otherwise."""

    @property
    def token_elements(self) -> int:
        """Elements of one layer's KV of one token and one KV head."""
        return self.head_size if self.mla else 2 * self.head_size


def read_model(path: Path) -> KVShape:
    """The shape from ``config.json``, a folder that has one, or a model's folder in Hugging Face's cache.

    Raises:
        ConfigError: there is none, it does not say what is needed, or such a model is not cached.
    """
    file = _config_file(path)
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{file} is too large for a model's config.json")
        config = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; name a model's config.json or its folder") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} is not JSON ({error}); name a model's config.json or its folder") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is no model's config.json: it holds a {type(config).__name__}")
    text: dict[str, Any] = next(
        (config[key] for key in ("text_config", "llm_config") if isinstance(config.get(key), dict)), {}
    )
    merged = {**config, **text}
    reason = _why_unsupported(merged)
    if reason:
        raise ConfigError(f"{file}: {reason}; vLLM serves such a model without this cache")
    return _shape(merged, str(file))


def _config_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    main = path / "refs" / "main"
    if main.is_file():
        return path / "snapshots" / main.read_text().strip() / "config.json"
    snapshots = sorted(path.glob("snapshots/*/config.json"), key=lambda file: file.stat().st_mtime)
    if not snapshots:
        raise ConfigError(f"{path} has no config.json; name a model's config.json or its folder")
    return snapshots[-1]


def _why_unsupported(config: Mapping[str, Any]) -> str:
    """Why the connector does not cache such a model; empty when it does."""
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder model has cross attention, which is not supported"
    for key in _SPARSE_KEYS:
        if config.get(key):
            return f"sparse attention ({key}) is not supported"
    kinds = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        return f"layers of kind {', '.join(kinds)} are not supported"
    for key in _STATE_KEYS:
        if config.get(key):
            return f"a model with layers that keep a state ({key}) is not supported"
    if config.get("attention_chunk_size"):
        return "chunked attention (attention_chunk_size) is not supported"
    window = config.get("sliding_window", _DEFAULT_SLIDING_WINDOW.get(str(config.get("model_type"))))
    if window and config.get("use_sliding_window", not _has_switch(config)):
        return f"a sliding window ({window} tokens) is not supported"
    return ""


def _has_switch(config: Mapping[str, Any]) -> bool:
    """Families whose window is off unless ``use_sliding_window`` says otherwise."""
    return str(config.get("model_type")).startswith(("qwen2", "qwen3"))


def _shape(config: Mapping[str, Any], where: str) -> KVShape:
    model_type = str(config.get("model_type", "unknown"))
    heads = _number(config, _HEADS, where)
    mla = config.get("kv_lora_rank") is not None
    if mla:
        kv_heads = 1
        size = _number(config, ("kv_lora_rank",), where) + _number(config, ("qk_rope_head_dim",), where)
    else:
        kv_heads = _kv_heads(config, heads, where)
        size = _head_size(config, model_type, heads, where)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(
            f"{where}: dtype {dtype!r} is not one of {', '.join(sorted(_DTYPES))}; give --dtype"
        )
    return KVShape(
        model_type=model_type,
        num_layers=_number(config, _LAYERS, where),
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        mla=mla,
        dtype="bfloat16" if dtype == "float32" else dtype,  # vLLM does not serve in float32 unless told to
    )


def _kv_heads(config: Mapping[str, Any], heads: int, where: str) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon, GPT-BigCode
        return 1
    given = any(config.get(name) is not None for name in _KV_HEADS)
    return _number(config, _KV_HEADS, where) if given else heads


def _head_size(config: Mapping[str, Any], model_type: str, heads: int, where: str) -> int:
    if config.get("head_dim") is not None:
        return _number(config, ("head_dim",), where)
    known = _DEFAULT_HEAD_SIZE.get(model_type)
    return known if known is not None else _number(config, _HIDDEN, where) // heads


def _number(config: Mapping[str, Any], names: tuple[str, ...], where: str) -> int:
    """The first of ``names`` that is there.

    Raises:
        ConfigError: none is, or it is no positive number.
    """
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        raise ConfigError(f"{where} does not say {names[0]}; is it a language model's config.json?")
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _MAX_NUMBER:
        raise ConfigError(f"{where}: {name} = {value!r} is no positive whole number")
    return value
