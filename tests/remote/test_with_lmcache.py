"""LMCache's own server and its own client, where the package is importable:

    pip install --no-deps --target DIR lmcache==0.5.6 aiofile caio
    PYTHONPATH=DIR pytest -m slow tests/remote/test_with_lmcache.py

Beside it it needs torch. Not part of CI.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.testing.process import ServerProcess, free_port
from kvstrata.testing.remote_server import RemoteServerThread
from kvstrata.testing.tier import ODD_MODEL_NAMES, make_frame, make_keys, read_frames
from kvstrata.tiers.lm import LmOptions, LmTier
from kvstrata.types import Miss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lmcache") is None, reason="lmcache is not installed"),
]

CLIENT = """
import asyncio, sys
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.connector import base_connector
from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector

class Tensor:
    def __init__(self, tensor, form):
        self.tensor, self.form = tensor, form
        self.byte_array = memoryview(tensor.view(torch.uint8).numpy()).cast("B")
    def get_shape(self): return self.tensor.shape
    def get_dtype(self): return self.tensor.dtype
    def get_memory_format(self): return self.form

class Memory:
    config = metadata = None
    def allocate(self, shape, dtype, form): return Tensor(torch.zeros(shape, dtype=dtype), form)

async def main(port):
    base_connector.RemoteConnector.__init__ = lambda self, *_: None  # it wants the configuration of an engine
    client = LMCServerConnector("127.0.0.1", port, asyncio.get_running_loop(), Memory())
    for shape in ((2, 4, 256, 128), (2, 32, 256, 1024)):
        key = CacheEngineKey("meta-llama/Llama-3.1-8B-Instruct", 1, 0, 0x1F2E3D4C + shape[1], torch.bfloat16)
        assert not await client.exists(key)
        assert await client.get(key) is None
        sent = torch.randn(shape).to(torch.bfloat16)
        await client.put(key, Tensor(sent, MemoryFormat.KV_2LTD))
        assert await client.exists(key)
        got = await client.get(key)
        assert torch.equal(got.tensor, sent) and got.form is MemoryFormat.KV_2LTD
    await client.close()
    print("all right")

asyncio.run(main(int(sys.argv[1])))
"""


def test_lmcaches_client_with_our_server() -> None:
    with RemoteServerThread() as server:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(server.port)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert "all right" in done.stdout, done.stderr


@pytest.fixture
def lmcaches_server(tmp_path: Path) -> Iterator[int]:
    port = free_port()
    log = tmp_path / "log"
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port), "cpu"]
    with ServerProcess(
        "lmcache",
        command,
        log_path=log,
        ready=lambda: "Server started" in log.read_text(),
        start_timeout_seconds=120,
    ) as server:
        yield port
        assert "Traceback" not in server.log_tail(10_000)


def test_our_tier_with_lmcaches_server(lmcaches_server: int) -> None:
    """It takes every key apart, and hangs up on those that it does not like: none of ours."""
    keys = [key for name in ODD_MODEL_NAMES for key in make_keys(3, name)]
    sizes = [0, 1, 4096, 1_000_003] * 9
    frames = [make_frame(size, seed) for seed, size in enumerate(sizes[: len(keys)])]
    with contextlib.closing(LmTier(LmOptions(url=f"lm://127.0.0.1:{lmcaches_server}"))) as tier:
        assert tier.contains(keys) == [False] * len(keys)
        tier.write(keys, frames)
        assert tier.contains(keys) == [True] * len(keys)
        assert read_frames(tier, keys) == [bytes(frame) for frame in frames]
        assert tier.delete(keys[:2]) == 2
        assert isinstance(read_frames(tier, keys[:1])[0], Miss)
        assert list(tier.scan()) == []
        assert tier.stats().entries is None
