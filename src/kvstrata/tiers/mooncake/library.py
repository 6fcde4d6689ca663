"""The Mooncake client library: its import, its environment, its error codes.

Written against mooncake-transfer-engine 0.3.13. The codes are those of ``mooncake-store/include/types.h``.
"""

from __future__ import annotations

import math
import os
from typing import Any

from kvstrata import plugins

NO_ROOM = -200
TOO_SMALL = -600
"""INVALID_PARAMS; of a read into memory of ours, that the object is larger."""
NOT_READY = -703
NOT_FOUND = -704
GONE = frozenset({NOT_READY, NOT_FOUND, -707, -712, -714})
"""Not there, not yet there, or replaced while it was read."""
PER_OBJECT = GONE | {TOO_SMALL}
UNREACHABLE = frozenset({-900, -901})
"""RPC_FAIL and RPC_TIMEOUT: the master does not answer."""

_NAMES = {
    NO_ROOM: "NO_AVAILABLE_HANDLE",
    TOO_SMALL: "INVALID_PARAMS",
    NOT_READY: "REPLICA_IS_NOT_READY",
    NOT_FOUND: "OBJECT_NOT_FOUND",
    -705: "OBJECT_ALREADY_EXISTS",
    -706: "OBJECT_HAS_LEASE",
    -714: "OBJECT_REPLICA_BUSY",
    -800: "TRANSFER_FAIL",
    -900: "RPC_FAIL",
    -901: "RPC_TIMEOUT",
}


def code_name(code: int) -> str:
    """Mooncake's name of an error code, for messages."""
    return f"{_NAMES.get(code, 'error')} ({code})"


def set_environment(timeout_seconds: float) -> None:
    """Hand deadlines to the library by its variables. What is set already stays.

    It reads them when its first client of the process is made. An operation is a question to the master and a
    transfer; a transfer that stands still notices it up to twice.
    """
    third = timeout_seconds / 3
    for name, value in (
        ("MC_RPC_TIMEOUT_MS", math.ceil(1000 * third)),
        ("MC_RPC_CONNECT_TIMEOUT_MS", max(100, math.ceil(1000 * third / 2))),
        ("MC_TCP_PROGRESS_TIMEOUT_SEC", max(1, math.floor(third))),
        ("MC_STORE_CLIENT_SETUP_RETRIES", 1),
    ):
        os.environ.setdefault(name, str(value))


def load() -> Any:
    """The module ``mooncake.store``.

    Raises:
        PluginError: it cannot be had; the message says what to install.
    """
    for name, level in (("MC_LOG_LEVEL", "ERROR"), ("MC_YLT_LOG_LEVEL", "critical")):
        os.environ.setdefault(name, level)  # read when it is loaded; it tells every step on stderr otherwise
    return plugins.library("mooncake.store", "mooncake", "libibverbs1")
