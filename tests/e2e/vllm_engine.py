"""Real vLLM servers on CPU with our connector, and how their answers are compared."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from kvstrata.testing.process import free_port
from kvstrata.testing.vllm_server import Completion, VLLMServer

LOGPROB_TOLERANCE = 0.5
"""How far a candidate's logprob may lie from that of vLLM without us: four steps of a bf16 logit from 16 to 32.

bf16 answers depend on how vLLM batches and cuts a prompt, with or without a connector; `test_noise_of_vllm_itself`
looks at that on the machine at hand. Tokens must be equal wherever the two best are further apart than twice this.
"""


class Engine(VLLMServer):
    """A vLLM with our connector, and what its cache server says."""

    def __init__(
        self,
        model: Path,
        log_path: Path,
        *,
        role: str = "kv_both",
        connector_name: str = "KVStrataConnector",
        extra: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        self.http_port = free_port()
        settings = {"max_local_cpu_size": 0.5, "http_port": self.http_port, **(extra or {})}
        connector: dict[str, Any] = {"kv_connector": connector_name, "kv_role": role}
        connector["kv_connector_extra_config"] = settings
        super().__init__(model, log_path=log_path, connector=connector, **arguments)

    def stats(self) -> dict[str, Any]:
        """The figures of its cache server."""
        url = f"http://127.0.0.1:{self.http_port}/stats"
        with urllib.request.urlopen(url, timeout=10) as answer:
            stats: dict[str, Any] = json.load(answer)
        return stats

    def hit_tokens(self) -> dict[str, int]:
        """Hit tokens so far, by tier."""
        hits: dict[str, int] = self.stats()["totals"]["hit_tokens"]
        return hits

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def assert_equal_answers(expected: Completion, got: Completion) -> None:
    """Equal tokens where the margin is clear, logprobs within the tolerance, up to the first near tie."""
    assert got.prompt_tokens == expected.prompt_tokens
    for position, (want, have) in enumerate(zip(expected.top_logprobs, got.top_logprobs, strict=False)):
        for token in want.keys() & have.keys():
            difference = abs(want[token] - have[token])
            assert difference <= LOGPROB_TOLERANCE, (position, token, want, have)
        if expected.token_ids[position] != got.token_ids[position]:
            best, second = sorted(want.values(), reverse=True)[:2]
            assert best - second <= 2 * LOGPROB_TOLERANCE, (position, want, have)
            return
    assert len(got.token_ids) == len(expected.token_ids)
