"""Redis' ``maxmemory`` in units of Kubernetes: a server that is given ``80Gi`` does not start."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kvstrata.doctor.finding import Finding, Level

_MAX_FILE_BYTES = 16 << 20
# maxmemory 80Gi | maxMemory: "80Gi" | --maxmemory=80Gi | ["--maxmemory", "80Gi"] | - --maxmemory\n- 80Gi
_MAXMEMORY = re.compile(
    r"max[-_]?memory[\"']?[\s:=,\[-]*[\"']?(?P<number>\d+(?:\.\d+)?)(?P<unit>[KMGTPE]i?)(?![A-Za-z])", re.I
)
_COMMENT = re.compile(r"^\s*#.*$", re.M)


def check_units(file: Path) -> Iterator[Finding]:
    """Look for ``maxmemory`` with a unit that Redis does not know, in YAML, JSON or a redis.conf."""
    check = f"units in {file}"
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError("too large for a configuration")
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield Finding(check, Level.ERROR, f"cannot be read: {reason}", "name a YAML, JSON or redis.conf file")
        return
    text = _COMMENT.sub(lambda comment: " " * len(comment[0]), text)
    num_found = 0
    for match in _MAXMEMORY.finditer(text):
        unit = match["unit"]
        if not unit.endswith("i"):  # 80g and 80G are Redis' own (10^9)
            continue
        num_found += 1
        line = text.count("\n", 0, match.start()) + 1
        yield Finding(
            check,
            Level.ERROR,
            f"line {line}: maxmemory {match['number']}{unit} has a Kubernetes unit; Redis does not start with it",
            f"write {match['number']}{unit[0].lower()}b (Redis counts 1gb as 2^30 bytes, 1g as 10^9)",
        )
    if not num_found:
        yield Finding(check, Level.OK, "no maxmemory in a unit that Redis does not know")
