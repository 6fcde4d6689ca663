"""The package ``lmcache`` of the drop-in, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from drop_in_package import PROJECT, DropIn

from kvstrata.__about__ import __version__
from kvstrata.config.lmcache import LMCACHE_VERSION

QUIET = 'import warnings; warnings.simplefilter("ignore")\n'


def run(drop_in: DropIn, program: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*map(str, folders), str(drop_in.folder)])
    environment = {**os.environ, **variables, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", QUIET + program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def distribution(folder: Path, name: str, version: str) -> Path:
    """A folder in which pip would find an installed ``name``."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_version_and_project() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert project["dependencies"] == [f"kvstrata[http]=={__version__}"]


def test_this_process_sees_no_lmcache() -> None:
    with pytest.raises(ModuleNotFoundError):
        __import__("lmcache")


def test_what_programs_import_is_there_and_light(drop_in: DropIn) -> None:
    done = run(
        drop_in,
        """
import sys
import lmcache
from lmcache.integration.vllm.utils import ENGINE_NAME
from lmcache.logging import init_logger
from lmcache.v1.cache_engine import LMCacheEngineBuilder

LMCacheEngineBuilder.destroy(ENGINE_NAME)
print(lmcache.__version__, init_logger("x").name, "torch" in sys.modules, hasattr(lmcache, "__wrapped__"))
""",
    )
    assert done.stdout.split() == [f"{LMCACHE_VERSION}+kvstrata.{__version__}", "x", "False", "False"], (
        done.stderr
    )


MISSING = {
    "lmcache.config": "import lmcache.config",
    "lmcache.v1.config": "from lmcache.v1.config import LMCacheEngineConfig",
    "lmcache.v1.cache_engine.LMCacheEngine": "from lmcache.v1.cache_engine import LMCacheEngine",
    "lmcache.torch_dev": "from lmcache import torch_dev",
    "lmcache.sdk": "import importlib; importlib.import_module('lmcache.sdk')",
}


def test_what_is_missing_says_so_in_one_line(drop_in: DropIn) -> None:
    program = "".join(
        f"try:\n    {statement}\nexcept ImportError as error:\n    print(error)\n"
        for statement in MISSING.values()
    )
    done = run(drop_in, program)
    advice = "is not provided by kvstrata-lmcache; see kvstrata's docs/migrate-from-lmcache.md"
    assert done.stdout.splitlines() == [f"{name} {advice}" for name in MISSING], done.stderr


def test_beside_lmcache_it_refuses_in_one_line(drop_in: DropIn, tmp_path: Path) -> None:
    """Import, commands and doctor."""
    lmcache = distribution(tmp_path, "lmcache", "0.5.6")
    line = "lmcache 0.5.6 and kvstrata-lmcache 0.1.0 are both installed and overwrite each other's files: "
    done = run(drop_in, "try:\n    import lmcache\nexcept ImportError as error:\n    print(error)", lmcache)
    assert done.stdout.startswith(line)
    assert len(done.stdout.splitlines()) == 1
    for name in ("lmcache", "lmcache_server"):
        command = subprocess.run(
            [drop_in.command(name)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": f"{lmcache}{os.pathsep}{drop_in.folder}"},
        )
        assert command.returncode == 1
        assert command.stderr.startswith(f"lmcache: {line}")
        assert len(command.stderr.splitlines()) == 1
    program = "from kvstrata.distributions import lmcache_conflict; print(lmcache_conflict())"
    light = distribution(tmp_path / "light", "lmcache_cli", "0.5.7")
    assert run(drop_in, program, light).stdout.startswith("lmcache-cli 0.5.7 and kvstrata-lmcache ")
    program = """
from kvstrata.doctor.engine import _check_lmcache
for finding in _check_lmcache():
    print(finding.level, finding.found)
"""
    assert run(drop_in, program, lmcache).stdout.startswith("error lmcache 0.5.6 and kvstrata-lmcache 0.1.0")
    assert run(drop_in, program).stdout.startswith("ok its names are provided by kvstrata-lmcache 0.1.0")


CONNECTORS = """
import sys
from importlib import import_module
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as Factory
from kvstrata.integrations.vllm.plugin import register

PACKAGE = "lmcache.integration.vllm"

def show(step):
    for name, module in (
        ("LMCacheConnectorV1", None),
        ("LMCacheMPConnector", None),
        ("LMCacheConnectorV1", f"{PACKAGE}.lmcache_connector_v1"),
        ("LMCacheConnectorV1Dynamic", f"{PACKAGE}.lmcache_connector_v1"),
        ("LMCacheMPConnector", f"{PACKAGE}.lmcache_mp_connector"),
    ):
        config = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_module_path=module)
        found = Factory.get_connector_class(config)
        print(step, found.__module__, found.__name__)

show("without")
sys.path.insert(0, sys.argv[1])
register()
print("KVStrataConnector" in Factory._registry)
show("beside")
del sys.path[0]
register()
show("with")
print(import_module("lmcache").__spec__.origin)

# vLLM's own connector makes this; its class is exchanged, and it is started as ours.
vllms = import_module("vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector").LMCacheConnectorV1
ours = import_module("kvstrata.integrations.vllm.connector").LMCacheConnectorV1
made = []
ours.__init__ = lambda self, *arguments: made.append(arguments)
connector = vllms.__new__(vllms)
connector._kv_cache_config = "cache"
import_module(f"{PACKAGE}.vllm_v1_adapter").LMCacheConnectorV1Impl("config", "role", connector)
print(type(connector) is ours, made)
"""
OURS = "kvstrata.integrations.vllm.connector"
NAMES = ["LMCacheMPConnector", "LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheMPConnector"]


def test_connectors(drop_in: DropIn, tmp_path: Path) -> None:
    """Without our plug-in of vLLM, with it beside LMCache, which keeps its names, and with it alone.

    One process for all: importing vLLM takes long. A real vLLM is in the test of configurations.
    """
    pytest.importorskip("vllm")
    lmcache = distribution(tmp_path, "lmcache", "0.5.6")
    done = run(drop_in, CONNECTORS.replace("sys.argv[1]", repr(str(lmcache))))
    vllms = "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector LMCacheConnectorV1"
    ours = [f"{OURS} {name}" for name in NAMES]
    assert done.stdout.splitlines() == [
        *(f"without {each}" for each in (vllms, *ours)),
        "True",
        *(f"beside {each}" for each in (vllms, *ours)),
        *(f"with {each}" for each in (f"{OURS} LMCacheConnectorV1", *ours)),
        str(drop_in.folder / "lmcache" / "__init__.py"),
        "True [('config', 'role', 'cache')]",
    ], done.stderr
    assert done.stderr.count("are both installed") == 1
