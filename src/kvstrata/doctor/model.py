"""The model that is to be served: is it cached at all, and does L1 hold anything of it?"""

from __future__ import annotations

from pathlib import Path

from kvstrata.config import Settings
from kvstrata.doctor.finding import Finding, Level
from kvstrata.errors import ConfigError
from kvstrata.sizing import Deployment, Tier, measure, read_model


def check_model(path: Path, settings: Settings) -> Finding:
    """From its ``config.json``; KV of the model's own element type, all ranks' together."""
    try:
        model = read_model(path)
    except ConfigError as error:
        return Finding("model", Level.ERROR, str(error), "name another file, or serve another model")
    tiers = {Tier.L1: settings.max_local_cpu_bytes}
    sizes = measure(model, Deployment(chunk_size=settings.chunk_size), 1, tiers)
    num_tokens = sizes.rooms[0].tokens
    text = f"{model.model_type}: {sizes.token_bytes:,} bytes of KV per token, L1 holds {num_tokens:,} tokens"
    if num_tokens == 0:
        return Finding(
            "model",
            Level.ERROR,
            text,
            "raise max_local_cpu_size; 'kvstrata size --model PATH' says what fits",
        )
    return Finding("model", Level.OK, text)
