"""The pod that the operator makes for a Model is run: a real vLLM, a real Redis, a hit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pod import VLLMContainer

from kvstrata.operator.manifests import PORT, manifests
from kvstrata.operator.options import Options
from kvstrata.operator.probes import cache_reachable, connector_active
from kvstrata.operator.spec import parse_spec
from kvstrata.sizing import Deployment, measure, read_model
from kvstrata.testing.model import smollm2
from kvstrata.testing.process import free_port
from kvstrata.testing.redis_server import RedisServer
from kvstrata.testing.text import natural_text
from kvstrata.testing.transcripts import steps

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache"
PASSWORD = "s3cret"
ARGUMENTS = [
    "--enforce-eager",
    "--max-model-len=1024",
    "--no-enable-prefix-caching",
    "--enable-prompt-tokens-details",
]


def test_the_pod_of_a_model_hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command, arguments and environment as they are; the guides' commands see what the guides say."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup")
    model = smollm2(CACHE)
    port, http_port = free_port(), free_port()
    with RedisServer(["maxmemory 256mb", "maxmemory-policy allkeys-lru"], password=PASSWORD) as redis:
        options = Options(
            namespace="inference",
            image="registry.example.net/vllm:1",
            remote_url=f"redis://:$(REDIS_PASSWORD)@127.0.0.1:{redis.port}",
            redis_secret="lmcache-redis",
        )
        spec = {"modelName": str(model), "args": ARGUMENTS, "kvCache": {"enabled": True}}
        spec["env"] = [{"name": "KVSTRATA_HTTP_PORT", "value": str(http_port)}]
        deployment, _ = manifests("llama", "uid-1", parse_spec(spec, options), options)
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        vllm = VLLMContainer(
            container,
            str(model),
            port=port,
            log_path=tmp_path / "log",
            secrets={"lmcache-redis": {"redis-password": PASSWORD}},
            here={f"--port={PORT}": f"--port={port}", "/home/kvstrata": str(tmp_path / "home")},
        )
        reader = {
            "VLLM": vllm.url,
            "MODEL": str(model),
            "LOG": str(vllm.process.log_path),
            "KVSTRATA_REMOTE_URL": redis.url,
            "KVSTRATA_HTTP_PORT": str(http_port),
            "KVSTRATA_MAX_LOCAL_CPU_SIZE": "0.1",
        }
        shutil.copy(ROOT / "LICENSE", tmp_path)
        with vllm.process:
            for step in steps(ROOT / "docs" / "verify.md"):
                step.run(tmp_path, reader)
            for step in steps(ROOT / "docs" / "troubleshooting.md", "## No hits"):
                step.run(tmp_path, reader)
            answer = vllm.complete(natural_text(2000), max_tokens=8)
            assert not answer.cached_tokens
            again = vllm.complete(natural_text(2000), max_tokens=8)
            assert again.cached_tokens == again.prompt_tokens - 1
            pod = {"metadata": {"name": "p"}, "status": {"podIP": "127.0.0.1"}}
            pod["status"] |= {"conditions": [{"type": "Ready", "status": "True"}]}
            assert connector_active([pod], port).met is True
        monkeypatch.setenv("REDIS_PASSWORD", PASSWORD)
        assert cache_reachable(options.default_remote_url).met is True
    log = (tmp_path / "log").read_text()
    assert PASSWORD not in log
    sizes = measure(read_model(model), Deployment(block_size=128), 1)
    assert f"{sizes.token_bytes} bytes of KV per token and shard" in log
