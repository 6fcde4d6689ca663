"""What LMCache's documentation and guides tell people to set and to type: the list that the tests run.

``{redis}`` and the like stand for the address of the real thing; ports, paths and sizes are those of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

IN_PROCESS = '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
SERVER_BY_NAME = """{"kv_connector":"LMCacheMPConnector","kv_role":"kv_both",
    "kv_connector_extra_config":{"lmcache.mp.host":"tcp://localhost","lmcache.mp.port":PORT}}"""
SERVER_BY_PATH = """{"kv_connector":"LMCacheMPConnector",
    "kv_connector_module_path":"lmcache.integration.vllm.lmcache_mp_connector","kv_role":"kv_both",
    "kv_connector_extra_config":{"lmcache.mp.host":"tcp://localhost","lmcache.mp.port":PORT}}"""
SERVER = "lmcache server --l1-size-gb 0.5 --eviction-policy LRU --chunk-size 16"


@dataclass(frozen=True)
class Configuration:
    """One way to run vLLM with a cache."""

    name: str
    env: dict[str, str] = field(default_factory=dict)
    file: str = ""
    """The YAML file that ``LMCACHE_CONFIG_FILE`` names; "" for none."""
    connector: str = IN_PROCESS
    server: str = ""
    """The command that runs beside vLLM."""
    backend: str = ""
    """What holds the cache below L1."""
    log: tuple[str, ...] = ()
    """What vLLM's log says besides."""
    extras: tuple[str, ...] = ()
    """Modules that this way wants."""


_REDIS_VARIABLES = {
    "LMCACHE_USE_EXPERIMENTAL": "True",
    "LMCACHE_CHUNK_SIZE": "256",
    "LMCACHE_LOCAL_CPU": "False",
    "LMCACHE_REMOTE_URL": "{redis}",
    "LMCACHE_REMOTE_SERDE": "naive",
}
_REDIS_FILE = """\
chunk_size: 256
remote_url: "{redis}"
remote_serde: "naive"
local_cpu: true
max_local_cpu_size: 0.5
"""


def _remote(name: str, backend: str, *, serde: str = "naive", extras: tuple[str, ...] = ()) -> Configuration:
    text = f'chunk_size: 256\nlocal_cpu: false\nremote_url: "{{{backend}}}"\nremote_serde: "{serde}"\n'
    return Configuration(
        name, {"LMCACHE_USE_EXPERIMENTAL": "True"}, file=text, backend=backend, extras=extras
    )


CONFIGURATIONS = (
    Configuration("variables", _REDIS_VARIABLES, backend="redis"),
    Configuration("file", file=_REDIS_FILE, backend="redis"),
    Configuration(
        "file-and-variables",
        {**_REDIS_VARIABLES, "LMCACHE_REMOTE_URL": "redis://127.0.0.1:1"},
        file=_REDIS_FILE,
        backend="redis",
    ),
    Configuration(
        "three-tiers",
        file="""\
local_cpu: true
max_local_cpu_size: 0.5
local_storage: "{directory}"
max_local_storage_size: 1.0
remote_url: "{redis}"
remote_serde: "naive"
""",
        backend="redis",
    ),
    Configuration("server-by-name", connector=SERVER_BY_NAME, server=SERVER, log=("chunks have 32 tokens",)),
    Configuration("chunks-of-8", {"LMCACHE_CHUNK_SIZE": "8"}, log=("chunks have 32 tokens",)),
    _remote("cachegen", "redis", serde="cachegen", extras=("numpy",)),
    _remote("redis-password", "redis_password"),
    _remote("rediss", "rediss", extras=("cryptography",)),
    _remote("redis-sentinel", "redis_sentinel"),
    _remote("lm", "lm"),
    Configuration(
        "lm-experimental",
        file="""\
local_cpu: true
chunk_size: 256
max_local_cpu_size: 0.5
remote_url: "{lm_experimental}"
remote_serde: "naive"
""",
        backend="lm_experimental",
    ),
    _remote("infinistore", "infinistore", extras=("infinistore",)),
    _remote("mooncakestore", "mooncakestore", extras=("mooncake.store",)),
    Configuration("no-plug-in", {**_REDIS_VARIABLES, "VLLM_PLUGINS": "none"}, backend="redis"),
)
"""Ways that are run many at a time only (marked slow)."""

REPRESENTATIVE = Configuration(
    "server-by-path", connector=SERVER_BY_PATH, server=SERVER, log=("chunks have 32 tokens",)
)
"""The one that is always run."""

PYTHON_PROGRAM = """\
import os
from vllm import LLM, SamplingParams

os.environ["LMCACHE_CHUNK_SIZE"] = "256"
os.environ["LMCACHE_REMOTE_URL"] = "{redis}"
os.environ["LMCACHE_REMOTE_SERDE"] = "naive"

if __name__ == "__main__":
    llm = LLM(
        model="{model}",
        kv_transfer_config={"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    prompts = ["You can return your item within 30 days of purchase. How do I start a return?"]
    for _ in range(2):
        outputs = llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=16))
    print("answer:", outputs[0].outputs[0].text)

    from lmcache.integration.vllm.utils import ENGINE_NAME
    from lmcache.v1.cache_engine import LMCacheEngineBuilder

    LMCacheEngineBuilder.destroy(ENGINE_NAME)
"""
