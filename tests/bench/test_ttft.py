"""``kvstrata bench ttft`` on real vLLMs, with short prompts; nothing is asserted on how fast anything is."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstrata.bench.engines import started
from kvstrata.bench.ttft import TTFTConfig, measure, run
from kvstrata.testing.redis_server import RedisServer

CACHE = Path(__file__).parents[2] / ".cache"
SHORT = TTFTConfig(prompt_tokens=700, prompts=1, repeats=2, pause_seconds=0)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_every_tier_is_measured_and_nothing_is_left() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    with (
        RedisServer(["maxmemory 1gb", "maxmemory-policy allkeys-lru"]) as redis,
        started(model=None, cache_dir=CACHE, redis_url=redis.url, progress=lambda _: None) as engines,
    ):
        measured = measure(SHORT, engines, lambda _: None)
        assert measured.notes == []
        assert {name: len(pairs.ours) for name, pairs in measured.pairs.items()} == {
            "cold": 1,
            "l1": 2,
            "redis": 2,
            "disk": 2,
        }
        # A look-up covers all of the prompt, the last token included, which is computed all the same.
        warm = [pairs.hit_tokens for name, pairs in measured.pairs.items() if name != "cold"]
        assert warm == [[700, 700]] * 3

        assert engines.plain is not None
        assert engines.cache is not None
        of_running = TTFTConfig(
            prompt_tokens=600,
            prompts=1,
            repeats=1,
            pause_seconds=0,
            url=engines.ours.url,
            plain_url=engines.plain.url,
            cache_endpoint=engines.cache.endpoint,
        )
        report = run(of_running)
        # Redis cannot be emptied there, and would answer for the disk below it.
        assert list(report.ratios) == ["l1_over_native", "redis_over_native", "cold_over_none"]
