"""Which fault meets which backend, and why the others cannot: a section of ``docs/faults.md``.

Printed by ``python tests/fault/matrix.py``.
"""

from __future__ import annotations

from backends import BACKENDS

COLUMNS: dict[str, set[str]] = {
    "refuses": {"refuses connections", "killed, empty when it is back"},
    "silent": {"accepts and never answers", "stopped (SIGSTOP)"},
    "late": {"answers after the deadline"},
    "reset": {"resets in the middle of a bulk"},
    "garbage": {"answers garbage"},
    "length": {"values of a wrong length", "announces wrong lengths"},
    "other key": {"another key's value"},
    "full": {"out of memory", "answers 507", "no room to write"},
    "read-only": {"read-only replica", "failover", "answers 403"},
    "log-in": {"authentication revoked", "answers 403"},
    "TLS": {"TLS certificate expired"},
    "DNS": {"DNS gone"},
    "failover": {"failover"},
    "slots": {"slots move"},
    "empty": {
        "restarted empty",
        "killed, empty when it is back",
        "master restarted empty",
        "one restarted empty",
        "all files removed",
    },
    "clock": {"clock steps"},
}
"""Kinds of faults, and the cases that are of that kind."""

_NO_TLS = "without TLS; `rediss` and `lms` have the same code with it, and the cases"
_ONE = "Sentinel and Cluster only"
_SENTINEL = "Sentinel only; that a replica of a cluster takes over is in `tests/tiers/test_redis_cluster.py`"
_FILES = "no server, no connection, no log-in, no names"
_ROOT = "tests run as root, whom no permission stops; a directory that is gone takes no writes either"
_SOCKET = "the proxy of the test kit is for TCP; all but the connecting is the code of `redis`"
_SAME = "over TLS all but the connection is the same code, under test without it"
_EVICTS = "has no such state: it evicts"
_NONE = "has no such thing"
_FRAMES = "its protocol lists no keys; the frame's own checks are those of `lm`"
_LIBRARY = (
    "inside the client library, which holds the interpreter: a proxy in the tests' process could not answer"
)
_VALUES = "values are in the memory of the library's clients, out of reach"
_RESOLVES = "the client library resolves names and checks certificates by itself; here it speaks plain HTTP"
_ONLY_REDIS = {"failover": _ONE, "slots": _ONE}
_LOCAL = dict.fromkeys(["refuses", "silent", "late", "reset", "garbage", "log-in", "TLS", "DNS"], _FILES)

CANNOT: dict[str, dict[str, str]] = {
    "redis": {"TLS": _NO_TLS, **_ONLY_REDIS},
    "redis (unix socket)": {
        **dict.fromkeys(["late", "reset", "garbage"], _SOCKET),
        "TLS": _NONE,
        "DNS": _NONE,
        **_ONLY_REDIS,
    },
    "rediss": {"log-in": _SAME, "DNS": _SAME, **_ONLY_REDIS},
    "redis ring of 2": {"TLS": _NO_TLS, **_ONLY_REDIS},
    "redis under Sentinel": {"TLS": _NO_TLS, "slots": "Cluster only"},
    "redis cluster of 3": {
        "TLS": _NO_TLS,
        "read-only": "a node that is no master any more answers MOVED, as when slots move",
        "failover": _SENTINEL,
    },
    "disk": {**_LOCAL, "read-only": _ROOT, **_ONLY_REDIS},
    "file (shared directory)": {**_LOCAL, "read-only": _ROOT, **_ONLY_REDIS},
    "nixl": {**_LOCAL, "read-only": _ROOT, **_ONLY_REDIS},
    "s3": {"TLS": _RESOLVES, "DNS": _RESOLVES, **_ONLY_REDIS},
    "lm": {"full": _EVICTS, "read-only": _NONE, "TLS": _NO_TLS, **_ONLY_REDIS},
    "lms": {
        "full": _EVICTS,
        "read-only": _NONE,
        **dict.fromkeys(["length", "other key", "log-in", "DNS", "empty", "clock"], _SAME),
        **_ONLY_REDIS,
    },
    "lm (LMCache's protocol)": {
        "length": _FRAMES,
        "other key": _FRAMES,
        "full": _EVICTS,
        **dict.fromkeys(["read-only", "log-in", "TLS"], _NONE),
        **_ONLY_REDIS,
    },
    "mooncake": {
        **dict.fromkeys(["late", "reset", "garbage", "DNS"], _LIBRARY),
        "length": _VALUES,
        "other key": _VALUES,
        "full": _EVICTS,
        **dict.fromkeys(["read-only", "log-in", "TLS"], _NONE),
        **_ONLY_REDIS,
    },
    "infinistore": {
        "full": _EVICTS,
        **dict.fromkeys(["read-only", "log-in", "TLS"], _NONE),
        **_ONLY_REDIS,
    },
}
"""By backend and column: why there is no case."""


def has_case(backend: str, column: str) -> bool:
    return any(fault.name in COLUMNS[column] for fault in BACKENDS[backend].faults)


def matrix() -> list[str]:
    """Markdown: a row per backend, a cross for a case, else the number of the reason below."""
    reasons: list[str] = []
    lines = ["| backend | " + " | ".join(COLUMNS) + " |", "|---|" + ":-:|" * len(COLUMNS)]
    for backend in BACKENDS:
        cells = []
        for column in COLUMNS:
            reason = CANNOT.get(backend, {}).get(column, "")
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(str(reasons.index(reason) + 1) if reason else "x")
        lines.append(f"| {backend} | " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]


if __name__ == "__main__":
    print("\n".join(matrix()))  # noqa: T201
