from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata import plugins
from kvstrata.testing.faults import write_plugin
from kvstrata.testing.forked import ServerHost


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plug-in of the tier ``faulty``."""
    directory: Path = tmp_path_factory.mktemp("plugin")
    write_plugin(directory)
    return directory


@pytest.fixture
def with_plugin(plugin_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plug-in is found in this process and in its children."""
    monkeypatch.syspath_prepend(plugin_path)
    monkeypatch.setenv("PYTHONPATH", str(plugin_path))
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    plugins._found.cache_clear()
    plugins.load.cache_clear()


@pytest.fixture(scope="session")
def server_host() -> Iterator[ServerHost]:
    with ServerHost() as host:
        yield host
