"""The installed drop-in, and the model for those tests that run vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from drop_in_package import DropIn

from kvstrata.testing.model import smollm2

CACHE = Path(__file__).parents[2] / ".cache"


@pytest.fixture(scope="session")
def drop_in(tmp_path_factory: pytest.TempPathFactory) -> DropIn:
    return DropIn.install(tmp_path_factory.mktemp("drop-in"))


@pytest.fixture(scope="session")
def model() -> Path:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    return smollm2(CACHE)
