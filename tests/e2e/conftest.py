"""What the tests with a real vLLM share: models, text, a Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.testing.model import smollm2, tiny_llama, tokenize
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.text import natural_text

CACHE = Path(__file__).parents[2] / ".cache"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def model() -> Path:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    return smollm2(CACHE)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    return tiny_llama(CACHE)


@pytest.fixture(scope="session")
def corpus(model: Path) -> list[int]:
    """Token ids of natural text, long enough to cut distinct prompts from."""
    return tokenize(model, natural_text(300_000))


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(["save ''", "maxmemory 1gb", "maxmemory-policy allkeys-lru"]) as server:
        yield server
