"""vLLM's configuration and the workers' layouts -> the namespace of all keys."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvstrata.errors import LayoutError
from kvstrata.types import KVLayout, Namespace

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger(__name__)

# Fields of a Hugging Face configuration that say where or by what it was written, not what the model is.
_VOLATILE = frozenset({"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"})
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def round_chunk_size(wanted: int, block_size: int) -> int:
    """``wanted`` as a multiple of the block size, rounded up; says so when it differs."""
    chunk_size = -(-wanted // block_size) * block_size
    if chunk_size != wanted:
        logger.info(
            "chunk_size %d is no multiple of vLLM's block size %d: chunks have %d tokens",
            wanted,
            block_size,
            chunk_size,
        )
    return chunk_size


def build_namespace(
    vllm_config: VllmConfig, layout: KVLayout, *, fingerprint: str, num_shards: int, chunk_size: int
) -> Namespace:
    """The namespace of this engine. ``fingerprint`` is the model's, ``chunk_size`` a multiple of the block size."""
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    return Namespace(
        engine="vllm",
        model_name=str(model.model),
        model_fingerprint=fingerprint,
        kv_dtype=str(vllm_config.cache_config.cache_dtype),
        world_size=num_shards,
        parallel_shape=f"tp{parallel.tensor_parallel_size}pp{parallel.pipeline_parallel_size}"
        if num_shards > 1
        else "one",
        chunk_size=chunk_size,
        layout=layout,
    )


def common_layout(layouts: Mapping[tuple[int, int], KVLayout]) -> KVLayout:
    """The one layout of all ranks' payloads, ``(pp_rank, tp_rank)`` each.

    Raises:
        LayoutError: ranks have payloads of different sizes (layers that do not divide among pipeline stages).
    """
    ordered = [layouts[rank] for rank in sorted(layouts)]
    first = ordered[0]
    if any(layout.pages != first.pages for layout in ordered):
        first = msgspec.structs.replace(first, pages="ranks arrange their pages differently")
    if all(layout.fingerprint == first.fingerprint for layout in ordered):
        return first
    if any(
        (layout.block_size, layout.page_bytes, layout.dtype)
        != (first.block_size, first.page_bytes, first.dtype)
        for layout in ordered
    ):
        raise LayoutError("ranks hold different amounts of KV per token; that is not supported")
    # Same sizes, different meaning (scales of a quantised cache): one text that stands for all of them.
    formats = hashlib.sha256("\0".join(layout.kernel_format for layout in ordered).encode()).hexdigest()
    return msgspec.structs.replace(first, kernel_format=f"ranks {formats}")


def model_fingerprint(model: ModelConfig) -> str:
    """Hex digest of what the model is: configuration, element type, quantisation, weights.

    Weights count by a sample of their bytes where they are local files, so that a model that was trained
    further in place is another model, and by the revision otherwise. So this is to be called when the engine has
    loaded them, not when they may have been replaced.

    Raises:
        OSError: they cannot be read (any more).
    """
    config = model.hf_config.to_dict()
    facts = {
        "config": _stable(config),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "revision": str(model.revision or getattr(model.hf_config, "_commit_hash", None)),
        "weights": _weights_digest(Path(str(model.model))),
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def _stable(value: Any) -> Any:
    """``value`` with volatile fields dropped, and as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _stable(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _weights_digest(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
