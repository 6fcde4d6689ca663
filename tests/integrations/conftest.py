"""A real core in this process, shared by the connector's two halves, and engines around it."""

from __future__ import annotations

import logging
import warnings

import pytest

from kvstrata.client import LocalClient
from kvstrata.config import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM and torch, while they are imported
    pytest.importorskip("vllm")
    import simulated

    import kvstrata.integrations.vllm.connector as connector_module


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return simulated.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def client():
    with LocalClient(Settings(max_local_cpu_size=0.02)) as local:
        yield local


@pytest.fixture
def make_engine(folder, client, monkeypatch):
    """Engines whose connectors use ``client``."""
    monkeypatch.setattr(connector_module, "connect", lambda *_, **__: client)

    def make(**arguments):
        arguments.setdefault("extra_config", {})
        arguments["extra_config"] = {"chunk_size": 32} | arguments["extra_config"]
        return simulated.Engine(folder, **arguments)

    return make


@pytest.fixture
def log(caplog):
    """Messages of kvstrata, whose logger has a handler of its own and does not propagate."""
    logger = logging.getLogger("kvstrata")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="kvstrata")
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)
