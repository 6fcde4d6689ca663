"""The small real model in torch, for benchmarks that want its KV and what it predicts from KV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstrata.errors import ConfigError
from kvstrata.testing.model import ModelError, model_folder, tokenize

KV = NDArray[np.uint16]
"""Layers x 2 x tokens x heads x dims, the bits of bf16."""


class SmallModel:
    """SmolLM2-135M (30 layers, 3 KV heads of 64) unless told otherwise. Not thread-safe."""

    def __init__(self, cache_dir: Path, dtype: str = "bfloat16", folder: Path | None = None) -> None:
        """
        Args:
            cache_dir: where the small model is, or is made once.
            dtype: what it computes in; its KV is in bf16 all the same.
            folder: another model, as Hugging Face lays it out.

        Raises:
            ConfigError: torch or transformers is missing, or the model cannot be made.
        """
        try:
            import torch  # noqa: PLC0415  (takes seconds)
            from transformers import AutoModelForCausalLM, DynamicCache  # noqa: PLC0415
            from transformers.utils import logging  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"real KV needs torch and the demo extra ({error.name} is missing): "
                "pip install torch 'kvstrata[demo]'"
            ) from None
        try:
            self._folder = model_folder(folder, cache_dir.resolve())
        except ModelError as error:
            raise ConfigError(str(error)) from None
        logging.disable_progress_bar()
        self._torch: Any = torch
        self._new_cache: Any = DynamicCache
        try:
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                self._folder, dtype=getattr(torch, dtype), local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._folder} is no model that can be loaded: {error}") from None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._folder.name

    def tokenize(self, text: str) -> list[int]:
        """The token ids of ``text``."""
        return tokenize(self._folder, text)

    def kv(self, tokens: Sequence[int]) -> KV:
        """What it computes for a prompt, rounded to bf16."""
        torch = self._torch
        with torch.inference_mode():
            prompt = torch.tensor([list(tokens)])
            cache = self._model(prompt, use_cache=True, logits_to_keep=1).past_key_values
            layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
            both = torch.stack(layers).to(torch.bfloat16).transpose(2, 3).contiguous()
        kv: KV = both.view(torch.uint16).numpy()
        return kv

    def log_probabilities(self, kv: KV, tokens: Sequence[int]) -> Any:
        """After a prompt with this KV and each of ``tokens``: natural logarithms of the next token's probabilities.

        A tensor of tokens x vocabulary.
        """
        torch = self._torch
        with torch.inference_mode():
            logits = self._model(torch.tensor([list(tokens)]), past_key_values=self._cache(kv)).logits[0]
            return torch.log_softmax(logits.float(), -1)

    def continue_greedily(self, kv: KV, token: int, num_tokens: int) -> list[int]:
        """The most probable tokens, one after the other, after a prompt with this KV and ``token``."""
        torch = self._torch
        cache, found = self._cache(kv), [token]
        with torch.inference_mode():
            for _ in range(num_tokens):
                logits = self._model(torch.tensor([found[-1:]]), past_key_values=cache).logits
                found.append(int(logits[0, -1].argmax()))
        return found[1:]

    def _cache(self, kv: KV) -> Any:
        torch = self._torch
        cache = self._new_cache()
        tensors = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16).to(self._model.dtype)
        for index, (keys, values) in enumerate(tensors.transpose(2, 3)):
            cache.update(keys[None], values[None], index)
        return cache
