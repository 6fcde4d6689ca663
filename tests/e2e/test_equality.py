"""Answers with the cache equal answers without it: a randomised schedule against a vLLM without connector."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vllm_engine import Engine, assert_equal_answers

from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.vllm_server import Completion, VLLMServer

BLOCK_ARGS = ["--block-size", "32", "--num-gpu-blocks-override", "48", "--max-model-len", "1024"]
"""A small KV space: four requests of the schedule do not fit, so that some are preempted."""
EXTRA = {"chunk_size": 96, "save_decode_cache": True}
NUM_ROUNDS = 10
SEED = 20261122


class Schedule:
    """Rounds of requests: shared prefixes, exact repeats, multi-turn, all drawn from a seed."""

    def __init__(self, corpus: Sequence[int], seed: int) -> None:
        self._random = random.Random(seed)
        self._documents = [list(corpus[start : start + 700]) for start in (0, 5000, 9000)]
        self._questions = list(corpus[12_000:])
        self._asked: list[tuple[list[int], tuple[int, ...]]] = []

    def _new_prompt(self) -> list[int]:
        kind = self._random.random()
        if self._asked and kind < 0.2:
            return self._random.choice(self._asked)[0]
        question = self._questions[(at := self._random.randrange(5000)) : at + self._random.randrange(1, 60)]
        if self._asked and kind < 0.5:
            prompt, answer = self._random.choice(self._asked)
            return [*prompt, *answer, *question][:900]
        document = self._random.choice(self._documents)
        return document[: self._random.randrange(10, len(document))] + question

    def round(self) -> list[list[int]]:
        """Prompts to send at once."""
        return [self._new_prompt() for _ in range(self._random.choice((1, 2, 4)))]

    def answered(self, prompt: list[int], answer: Completion) -> None:
        self._asked.append((prompt, answer.token_ids))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equality")


@pytest.fixture(scope="module")
def reference(model: Path, directory: Path) -> VLLMServer:
    return VLLMServer(model, log_path=directory / "reference.log", args=BLOCK_ARGS)


@pytest.fixture(scope="module")
def engine(model: Path, directory: Path, redis_server: RedisServer) -> Engine:
    extra = {**EXTRA, "local_disk": str(directory / "disk"), "remote_url": redis_server.url}
    return Engine(model, directory / "engine.log", extra=extra, args=BLOCK_ARGS, prefix_caching=True)


@pytest.fixture(scope="module")
def servers(reference: VLLMServer, engine: Engine) -> Iterator[tuple[VLLMServer, Engine]]:
    try:
        reference.launch()
        engine.launch()
        reference.wait_until_ready()
        engine.wait_until_ready()
        yield reference, engine
    finally:
        engine.stop()
        reference.stop()


def ask_all(server: VLLMServer, prompts: Sequence[Sequence[int]]) -> list[Completion]:
    """All at once; the answers in the order of the prompts."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(
            threads.map(lambda prompt: server.complete(prompt, max_tokens=24, ignore_eos=True), prompts)
        )


def run_rounds(servers: tuple[VLLMServer, Engine], schedule: Schedule, num_rounds: int) -> None:
    reference, engine = servers
    for number in range(num_rounds):
        prompts = schedule.round()
        expected = [reference.complete(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts]
        got = ask_all(engine, prompts)
        for prompt, want, have in zip(prompts, expected, got, strict=True):
            assert_equal_answers(want, have)
            schedule.answered(prompt, want)
        if number % 3 == 2:
            engine.reset_prefix_cache()


@pytest.mark.leaks_allowed("the engine that it starts again is stopped with the module")
def test_randomised_schedule_with_restart(
    servers: tuple[VLLMServer, Engine], corpus: list[int], directory: Path
) -> None:
    """Shared prefixes, turns, concurrency, preemption; then vLLM and its cache server restart, L1 is empty."""
    reference, engine = servers
    schedule = Schedule(corpus, SEED)
    run_rounds(servers, schedule, NUM_ROUNDS)
    hits = engine.hit_tokens()
    assert hits["l1"] > 1000
    assert _preemptions(engine) > 0, "the schedule is meant to preempt requests"
    engine.stop()
    engine.start()
    run_rounds((reference, engine), schedule, 3)
    warm = engine.hit_tokens()
    assert warm["disk"] + warm["redis"] > 0


def _preemptions(engine: VLLMServer) -> float:
    lines = [line for line in engine.metrics().splitlines() if line.startswith("vllm:num_preemptions_total")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_noise_of_vllm_itself(servers: tuple[VLLMServer, Engine], corpus: list[int]) -> None:
    """The stated tolerance covers what vLLM's own batching does to answers, and is not much wider."""
    reference, _ = servers
    prompts = [corpus[start : start + 300] for start in (20_000, 20_400, 20_800, 21_200)]
    alone = [reference.complete(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts]
    for want, have in zip(alone, ask_all(reference, prompts), strict=True):
        assert_equal_answers(want, have)
