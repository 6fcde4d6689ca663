"""Registration under vLLM's names, in processes of their own: it changes what modules exist."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm")

PREPARE = """
import sys, warnings
warnings.simplefilter("ignore")
from kvstrata.integrations.vllm.plugin import register
register()
register()
"""


def run(program):
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_names_lead_to_ours_where_lmcache_is_not_installed():
    out = run("""
from importlib import import_module
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as Factory

def found(name, module=None):
    config = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_module_path=module)
    return Factory.get_connector_class(config)

for name in ("KVStrataConnector", "LMCacheConnectorV1", "LMCacheMPConnector"):
    print(found(name).__module__, found(name).__name__, found(name).default_server_url)
print(found("KVStrataConnector", "kvstrata.integrations.vllm").__name__)
print(found("LMCacheMPConnector", "lmcache.integration.vllm.lmcache_mp_connector").__module__)
print(found("LMCacheConnectorV1", "lmcache.integration.vllm.lmcache_connector_v1").__module__)
try:
    from lmcache.integration.vllm import vllm_adapter
except ImportError as error:
    print("ImportError")
""")
    module = "kvstrata.integrations.vllm.connector"
    assert out.splitlines() == [
        f"{module} KVStrataConnector None",
        f"{module} LMCacheConnectorV1 None",
        f"{module} LMCacheMPConnector tcp://127.0.0.1:5555",
        "KVStrataConnector",
        module,
        module,
        "ImportError",
    ]


def test_an_installed_lmcache_keeps_its_names(tmp_path):
    (tmp_path / "lmcache").mkdir()
    (tmp_path / "lmcache" / "__init__.py").write_text("VERSION = 1\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
        + PREPARE
        + """
import lmcache
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as Factory
print(lmcache.VERSION, Factory.get_connector_class_by_name("KVStrataConnector").__name__)
print("lmcache.integration" in sys.modules)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == ["1 KVStrataConnector", "False"], done.stderr


def test_registering_imports_nothing_heavy():
    program = """
import sys
import kvstrata.integrations.vllm.plugin
print([name for name in ("torch", "vllm", "kvstrata.client") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
