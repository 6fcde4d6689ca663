"""Codecs between a real vLLM and a real Redis: what comes back gives the answers that it should."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_engine import Engine, assert_equal_answers

from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.vllm_client import Completion
from kvstrata.testing.waiting import wait_until

ARGS = ["--block-size", "32", "--max-model-len", "1024", "--no-enable-prefix-caching"]
PROMPT_TOKENS = 600
CHUNK_TOKENS = 256


def settings(codec: str, redis_url: str) -> dict[str, object]:
    """Redis alone, so that nothing is answered from elsewhere."""
    return {
        "chunk_size": CHUNK_TOKENS,
        "local_cpu": False,
        "gate": False,
        "lookup_timeout_ms": 5000,
        "remote_url": redis_url,
        "remote_serde": codec,
    }


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["zstd", "cachegen", "cachegen:high"])
def test_answers_from_encoded_kv(
    codec: str, model: Path, corpus: list[int], redis_server: RedisServer, tmp_path: Path
) -> None:
    prompts = [corpus[start : start + PROMPT_TOKENS] for start in range(60_000, 64_000, 1000)]
    extra = settings(codec, redis_server.url)
    with Engine(model, tmp_path / "engine.log", extra=extra, args=ARGS) as engine:

        def ask() -> list[Completion]:
            return [engine.complete(prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]

        computed = ask()
        wait_until(
            lambda: all(tier["queued_bytes"] == 0 for tier in engine.stats()["tiers"]), "all is written", 60
        )
        loaded = ask()
        assert engine.hit_tokens()["redis"] > 0
    assert [answer.cached_tokens for answer in loaded] == [PROMPT_TOKENS - 1] * len(prompts)
    for want, have in zip(computed, loaded, strict=True):
        if codec == "zstd":
            assert_equal_answers(want, have)
        else:
            assert_close_answers(want, have)


def assert_close_answers(want: Completion, have: Completion) -> None:
    """Where the best token is far ahead it stays the best; up to the first other one, as answers then go apart."""
    for position, (before, after) in enumerate(zip(want.top_logprobs, have.top_logprobs, strict=True)):
        for token in before.keys() & after.keys():
            assert abs(before[token] - after[token]) < 2.0, (position, before, after)
        if want.token_ids[position] != have.token_ids[position]:
            best, second = sorted(before.values(), reverse=True)[:2]
            assert best - second < 1.0, (position, before, after)
            return
