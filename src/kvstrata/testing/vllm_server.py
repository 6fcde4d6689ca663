"""A real vLLM OpenAI server on CPU, for tests, the demo and benchmarks.

A start takes 32-35 s on two cores, most of it three imports of vLLM one after the other (API server, engine
core, worker), on one core: two servers that start at the same time are ready after hardly more than one.
The first request of a server takes about 4 s however short it is: send one before measuring.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from kvstrata.testing.process import ServerFailed, ServerProcess, free_port

MAX_MODEL_TOKENS = 4096
START_TIMEOUT_SECONDS = 300.0


class Completion(msgspec.Struct, frozen=True):
    """One greedy answer and how long it took."""

    token_ids: tuple[int, ...]
    top_logprobs: tuple[dict[int, float], ...]
    """For each token the candidates with their logprobs, best first (five, plus the token if it is none)."""
    text: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int | None
    """Prompt tokens that vLLM did not compute (its own prefix cache and the connector's)."""
    ttft_seconds: float
    """From sending the request to the first token."""
    total_seconds: float


class VLLMServer:
    """``python -m vllm.entrypoints.openai.api_server`` on a free port of 127.0.0.1, with all its processes.

    A context manager; ``start`` and ``stop`` do the same by hand, any number of times. ``complete`` may be
    called from several threads, everything else from one.

    Args:
        model: the model's folder.
        log_path: where its log goes; appended to.
        connector: the value of ``--kv-transfer-config``; None for a vLLM without connector.
        prefix_caching: vLLM's own prefix cache.
        kv_space_gb: room for KV in the engine.
        args: further arguments; a later ``--max-model-len`` and the like wins.
        env: further variables; None as a value removes one.
        progress: told once in a while how long the start has taken.
    """

    def __init__(
        self,
        model: Path,
        *,
        log_path: Path,
        connector: Mapping[str, Any] | None = None,
        prefix_caching: bool = False,
        kv_space_gb: int = 1,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.model = model
        self.log_path = log_path
        self.port = 0
        self._connector = connector
        self._prefix_caching = prefix_caching
        self._args = list(args)
        self._env = {**self._environment(kv_space_gb), **(env or {})}
        self._start_timeout_seconds = start_timeout_seconds
        self._progress = progress
        self._process: ServerProcess | None = None

    @staticmethod
    def _environment(kv_space_gb: int) -> dict[str, str | None]:
        return {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(kv_space_gb),
            "VLLM_CPU_OMP_THREADS_BIND": _cores(),
            "VLLM_LOGGING_COLOR": "0",
        }

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), "--served-model-name", self.model.name]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += [
            "--enforce-eager",
            "--max-model-len",
            str(MAX_MODEL_TOKENS),
            "--enable-prompt-tokens-details",
        ]
        command.append("--enable-prefix-caching" if self._prefix_caching else "--no-enable-prefix-caching")
        if self._connector is not None:
            command += ["--kv-transfer-config", json.dumps(self._connector)]
        return command + self._args

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it is healthy.

        Raises:
            ServerFailed: it ended, or was not healthy in time; the message holds the end of its log.
        """
        self.launch()
        self.wait_until_ready()

    def launch(self) -> None:
        """Start it without waiting; :meth:`wait_until_ready` is to follow."""
        if self._process is not None:
            raise RuntimeError("this vLLM is running already")
        self.port = free_port()
        self._process = ServerProcess(
            "vLLM",
            self._command(),
            log_path=self.log_path,
            env=self._env,
            ready=self.healthy,
            start_timeout_seconds=self._start_timeout_seconds,
            grace_seconds=15.0,
            progress=self._progress,
        )
        self._process.launch()

    def wait_until_ready(self) -> None:
        """Wait after :meth:`launch`.

        Raises:
            ServerFailed: as :meth:`start`.
        """
        try:
            self.process.wait_until_ready()
        except BaseException:
            self._process = None
            raise

    @property
    def process(self) -> ServerProcess:
        """The running server.

        Raises:
            ServerFailed: it has not been started.
        """
        if self._process is None:
            raise ServerFailed("this vLLM is not running")
        return self._process

    def stop(self) -> None:
        """End it and everything it started. Idempotent."""
        if self._process is not None:
            process, self._process = self._process, None
            process.stop()

    def kill9(self) -> None:
        """SIGKILL the API server, the engine core and its workers, at once, and nothing else.

        What they leave behind (an embedded kvstrata server) has to end by itself; ``stop`` is to follow.
        """
        names = {pid: _title(pid) for pid in self.process.processes()}
        own = [pid for pid, title in names.items() if pid == self.process.pid or title.startswith("VLLM::")]
        self.process.kill(signal.SIGKILL, processes=own)

    def worker_pids(self) -> list[int]:
        """The processes that run the model."""
        return [pid for pid in self.process.processes() if _title(pid).startswith("VLLM::Worker")]

    @property
    def url(self) -> str:
        """The base of its HTTP API."""
        return f"http://127.0.0.1:{self.port}"

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            return self.request("GET", "/health", timeout_seconds=5.0)[0] == 200
        except OSError:
            return False

    def request(
        self, method: str, path: str, body: object = None, *, timeout_seconds: float = 60.0
    ) -> tuple[int, bytes]:
        """One HTTP request; returns status and body.

        Raises:
            OSError: it cannot be reached or does not answer in time.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_seconds)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise OSError(f"vLLM broke the connection: {error!r}") from error
        finally:
            connection.close()

    def reset_prefix_cache(self) -> None:
        """Empty vLLM's own prefix cache; no request may be running."""
        status, body = self.request("POST", "/reset_prefix_cache")
        if status != 200:
            raise ServerFailed(f"POST /reset_prefix_cache answered {status}: {body.decode(errors='replace')}")

    def metrics(self) -> str:
        """The Prometheus text of vLLM itself."""
        return self.request("GET", "/metrics")[1].decode()

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 16,
        timeout_seconds: float = 300.0,
        **body: Any,
    ) -> Completion:
        """A greedy completion with the five best candidates of every token.

        Args:
            prompt: text or token ids.
            body: further fields of the request (``kv_transfer_params``, ``cache_salt`` ...).

        Raises:
            ServerFailed: it answered with an error.
            OSError: it cannot be reached or does not answer in time.
        """
        fields: dict[str, Any] = {
            "model": self.model.name,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": 5,
            "return_tokens_as_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_seconds)
        try:
            start = time.perf_counter()
            connection.request(
                "POST", "/v1/completions", json.dumps(fields), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise ServerFailed(
                    f"vLLM answered {response.status}: {response.read().decode(errors='replace')}"
                )
            return _read_stream(response, start)
        except http.client.HTTPException as error:
            raise OSError(f"vLLM broke the connection: {error!r}") from error
        finally:
            connection.close()


def _read_stream(response: http.client.HTTPResponse, start: float) -> Completion:
    token_ids: list[int] = []
    top_logprobs: list[dict[int, float]] = []
    text: list[str] = []
    finish_reason = ""
    usage: dict[str, Any] = {}
    first = None
    while line := response.readline():
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ServerFailed(f"vLLM answered with an error: {event['error']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if first is None:
                first = time.perf_counter()
            text.append(choice["text"])
            finish_reason = choice["finish_reason"] or finish_reason
            if logprobs := choice["logprobs"]:
                token_ids += [_token_id(token) for token in logprobs["tokens"]]
                top_logprobs += [_candidates(position) for position in logprobs["top_logprobs"]]
    if first is None or not usage:
        raise ServerFailed("vLLM's answer ended before it was complete")
    return Completion(
        token_ids=tuple(token_ids),
        top_logprobs=tuple(top_logprobs),
        text="".join(text),
        finish_reason=finish_reason,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        ttft_seconds=first - start,
        total_seconds=time.perf_counter() - start,
    )


def _token_id(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def _candidates(position: Mapping[str, float]) -> dict[int, float]:
    ordered = sorted(position.items(), key=lambda item: -item[1])
    return {_token_id(token): logprob for token, logprob in ordered}


def _cores() -> str:
    """The cores for OpenMP: all that this process may use ("0,1").

    vLLM's own choice ("auto") leaves cores free, twice as many with a connector as without: one of two, which
    doubles prefill (31 s against 18 s for 3,500 tokens) and a hit in vLLM's own prefix cache (0.60 s against
    0.36 s), or none at all with a connector. "nobind" gives the same prefill but hits of 0.35 to 0.46 s.
    """
    return ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))


def _title(pid: int) -> str:
    """What the process calls itself (vLLM sets the titles of its processes)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return os.fsdecode(command.split(b"\0")[0])
