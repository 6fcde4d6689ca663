"""How many bytes the KV of a model takes, and what fits into each tier.

    model   a model's config.json -> the shape of its KV
    sizes   that shape -> bytes of a token, a chunk and a prompt in every tier

The arithmetic of slots, frames and pieces is the core's own; no torch and no inference engine is needed.
"""

from __future__ import annotations

from kvstrata.sizing.model import KVShape, read_model
from kvstrata.sizing.sizes import Deployment, Room, Sizes, Tier, measure

__all__ = ["Deployment", "KVShape", "Room", "Sizes", "Tier", "measure", "read_model"]
