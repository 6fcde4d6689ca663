"""The demo: a long prompt cold, then warm from each tier, and another one that shares half of it.

Two vLLMs start at once, one without connector and one with ours: on two cores that takes hardly longer than one
(see ``kvstrata.testing.vllm_server``). Only one of them works at a time. Then both are stopped, and with them our
cache server and its L1; two new ones with our connector start, one with Redis only, the other with the disk only,
so that no other tier can have supplied the prefix. vLLM's own prefix cache is off in all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kvstrata.demo.engines import CachedVLLM, cache_store
from kvstrata.demo.prompts import demo_prompts
from kvstrata.demo.report import DemoReport, Phase
from kvstrata.errors import KVStrataError
from kvstrata.testing.model import ModelError, smollm2, tokenize
from kvstrata.testing.process import ServerFailed
from kvstrata.testing.vllm_server import Completion, VLLMServer

ANSWER_TOKENS = 12
_WARM_UP = list(range(1000, 1064))
Progress = Callable[[str], None]


class DemoError(KVStrataError):
    """The demo cannot go on; the message says in one line why."""


def run(cache_dir: Path, *, prompt_tokens: int = 2048, progress: Progress = lambda _: None) -> DemoReport:
    """Run all phases. Everything that is started has ended when this returns or raises.

    Args:
        cache_dir: where the model is made once, and where logs go.
        prompt_tokens: length of the prompts; vLLM is started for at most 4096 with the answer.
        progress: told what is going on, a line at a time.

    Raises:
        DemoError: something cannot be started, or failed.
    """
    try:
        with _workspace(cache_dir) as workspace:
            progress("the model SmolLM2-135M-Instruct")
            model = smollm2(cache_dir)
            return _Demo(model, workspace, prompt_tokens, progress).run()
    except ServerFailed as error:
        raise DemoError(error.summary) from error
    except (ModelError, OSError, RuntimeError) as error:
        raise DemoError(str(error).splitlines()[0]) from error


@contextlib.contextmanager
def _workspace(cache_dir: Path) -> Iterator[Path]:
    """An empty folder for this run's logs and disk tier; what the last run left there is removed."""
    workspace = cache_dir / "demo"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(f"another demo is running in {cache_dir}") from None
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir()
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace / "disk", ignore_errors=True)


class _Demo:
    """One run, from the first server to the report."""

    def __init__(self, model: Path, workspace: Path, prompt_tokens: int, progress: Progress) -> None:
        self._model = model
        self._workspace = workspace
        self._progress = progress
        self._prompt, self._other_prompt = demo_prompts(lambda text: tokenize(model, text), prompt_tokens)
        self._phases: list[Phase] = []
        self._launched_at = 0.0
        self._said_seconds = 0

    def run(self) -> DemoReport:
        with cache_store() as store:
            self._progress(f"Valkey listens on port {store.port}")
            redis, disk = {"remote_url": store.url}, {"local_disk": str(self._workspace / "disk")}
            plain = VLLMServer(self._model, log_path=self._log_path("plain"), progress=self._still_starting)
            ours = self._cached("cold", {**redis, **disk})
            with self._up("vLLM without connector, and vLLM with ours (L1, Redis, disk)", plain, ours):
                self._progress("asking vLLM without connector")
                expected, expected_other = (
                    self._ask(plain, self._prompt),
                    self._ask(plain, self._other_prompt),
                )
                plain.stop()
                self._phase("cold", ours, self._prompt, expected)
                self._phase("l1", ours, self._prompt, expected)
                ours.settle()
            self._progress("stopped vLLM and its cache server: L1 is gone")
            from_redis, from_disk = self._cached("redis", redis), self._cached("disk", disk)
            with self._up("vLLM with Redis only, and vLLM with disk only", from_redis, from_disk):
                self._phase("redis", from_redis, self._prompt, expected)
                from_redis.stop()
                store.kill()
                self._phase("disk", from_disk, self._prompt, expected)
                self._phase("shared_prefix", from_disk, self._other_prompt, expected_other)
        return DemoReport(tuple(self._phases))

    def _log_path(self, name: str) -> Path:
        return self._workspace / f"vllm-{name}.log"

    def _cached(self, name: str, settings: Mapping[str, Any]) -> CachedVLLM:
        log_path = self._log_path(name)
        return CachedVLLM(self._model, log_path=log_path, settings=settings, progress=self._still_starting)

    def _still_starting(self, _seconds: float) -> None:
        seconds = time.monotonic() - self._launched_at
        if seconds >= self._said_seconds + 10:
            self._said_seconds += 10
            self._progress(f"  still starting after {self._said_seconds} s")

    @contextlib.contextmanager
    def _up(self, what: str, *servers: VLLMServer) -> Iterator[None]:
        """Both servers, started at once and warmed up; stopped on exit."""
        self._progress(f"starting {what}")
        self._launched_at, self._said_seconds = time.monotonic(), 0
        with contextlib.ExitStack() as stack:
            for server in servers:
                stack.callback(server.stop)
                server.launch()
            for server in servers:
                server.wait_until_ready()
            for server in servers:
                # The first request of a process takes seconds however short it is; the second one is a hit,
                # so that code which loads has run once too.
                self._ask(server, _WARM_UP)
                self._ask(server, _WARM_UP)
            yield

    @staticmethod
    def _ask(server: VLLMServer, prompt: list[int]) -> Completion:
        return server.complete(prompt, max_tokens=ANSWER_TOKENS, ignore_eos=True)

    def _phase(self, name: str, server: CachedVLLM, prompt: list[int], expected: Completion) -> None:
        self._progress(f"phase {name}")
        before = server.hit_tokens()
        answer = self._ask(server, prompt)
        cold = self._phases[0].ttft_seconds if self._phases else answer.ttft_seconds
        self._phases.append(
            Phase(
                name=name,
                prompt_tokens=answer.prompt_tokens,
                hit_tokens=server.hit_tokens().since(before),
                ttft_seconds=answer.ttft_seconds,
                speedup=cold / answer.ttft_seconds,
                answer_equal=answer.token_ids == expected.token_ids,
            )
        )
