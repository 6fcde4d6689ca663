"""A client of a vLLM OpenAI server: greedy completions with logprobs and timings, and what a test asks for."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvstrata.testing.process import ServerFailed


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


class VLLMClient:
    """Talks to the server at ``host:port`` that serves ``model_name``; from any number of threads."""

    def __init__(self, host: str, port: int, model_name: str) -> None:
        self.host = host
        self.port = port
        self.model_name = model_name

    @property
    def url(self) -> str:
        """The base of its HTTP API."""
        return f"http://{self.host}:{self.port}"

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
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_seconds)
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
            "model": self.model_name,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": 5,
            "return_tokens_as_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
        }
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_seconds)
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
