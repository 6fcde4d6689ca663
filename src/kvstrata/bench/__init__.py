"""Benchmarks: what the cache costs and brings, each against the best that the same machine does in the same run.

One module per benchmark; each has a frozen ``...Config`` and a ``run`` that returns a :class:`Report`.
"""

from __future__ import annotations

from kvstrata.bench.report import Report, Target

__all__ = ["Report", "Target"]
