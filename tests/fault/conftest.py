from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from report import ROWS, table, write

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of the fault suite, and its JSON where FAULT_REPORT says so."""
    if not ROWS:
        return
    terminalreporter.section("faults")
    for line in table(ROWS):
        terminalreporter.write_line(line)
    num_passed = sum(row.passed for row in ROWS)
    terminalreporter.write_line(f"{num_passed} of {len(ROWS)} cases passed")
    if path := os.environ.get("FAULT_REPORT"):
        write(ROWS, Path(path))
        terminalreporter.write_line(f"written to {path}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A case that was too slow fails the run that was started for the report, and no other."""
    late = [row for row in ROWS if not row.passed]
    if late and os.environ.get("FAULT_REPORT") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
