"""What ``kvstrata demo`` runs: the main job, on a real vLLM and a real model, with every number measured."""

from __future__ import annotations
