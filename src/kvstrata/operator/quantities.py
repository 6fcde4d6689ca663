"""Quantities as Kubernetes writes them: ``80Gi``, ``500m``, ``2e9``."""

from __future__ import annotations

import re

_UNITS = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0,
    "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip
_QUANTITY = re.compile(r"(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,2})|([A-Za-z]{0,2}))")
_REDIS_UNIT = re.compile(r"(\d+)([kmg])b", re.IGNORECASE)


def parse_quantity(value: object) -> float:
    """What a quantity means: bytes, cores, pieces.

    Raises:
        ValueError: Kubernetes would refuse it; the message says how it is written.
    """
    match = _QUANTITY.fullmatch(str(value))
    if isinstance(value, bool) or match is None or (match[3] or "") not in _UNITS:
        redis = _REDIS_UNIT.fullmatch(str(value))
        hint = f"; {value} of Redis is {redis[1]}{redis[2].upper()}i" if redis else ""
        raise ValueError(
            f"{value!r} is no quantity of Kubernetes: a number with Ki, Mi, Gi, k, M, G or m{hint}"
        )
    return float(match[1]) * (10.0 ** int(match[2]) if match[2] else _UNITS[match[3]])
