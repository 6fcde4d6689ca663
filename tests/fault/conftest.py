from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.testing.faults import write_plugin
from kvstrata.testing.forked import ServerHost


@pytest.fixture(scope="session")
def server_host() -> Iterator[ServerHost]:
    with ServerHost() as host:
        yield host


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the plug-in of the tier ``faulty``."""
    directory: Path = tmp_path_factory.mktemp("plugin")
    write_plugin(directory)
    return directory
