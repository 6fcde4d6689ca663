"""A real vLLM OpenAI server on CPU, for tests, the demo and benchmarks.

A start takes 32-35 s on two cores, most of it three imports of vLLM one after the other (API server, engine
core, worker), on one core: two servers that start at the same time are ready after hardly more than one.
The first request of a server takes about 4 s however short it is: send one before measuring.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstrata.testing.process import ServerFailed, ServerProcess, free_port
from kvstrata.testing.vllm_client import Completion, VLLMClient

__all__ = ["MAX_MODEL_TOKENS", "Completion", "VLLMServer", "our_connector"]

MAX_MODEL_TOKENS = 4096
START_TIMEOUT_SECONDS = 300.0


def our_connector(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The value of ``--kv-transfer-config`` for our connector with these settings."""
    return {
        "kv_connector": "KVStrataConnector",
        "kv_connector_module_path": "kvstrata.integrations.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": dict(settings),
    }


class VLLMServer(VLLMClient):
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
        super().__init__("127.0.0.1", 0, model.name)
        self.model = model
        self.log_path = log_path
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
        command += ["--model", str(self.model), "--served-model-name", self.model_name]
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
