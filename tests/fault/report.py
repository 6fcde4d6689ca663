"""The table of cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

RECOVERY_SECONDS = 5.0
"""Within this time of its recovery a tier must be used again."""


class Row(msgspec.Struct, kw_only=True):
    """One case. These are the keys of ``fault-report.json``."""

    backend: str
    fault: str
    wrong_bytes: int = 0
    longest_wait_seconds: float = 0.0
    """The longest time that any verb of the client took, from its first call to its last answer."""
    deadline_seconds: float
    """The look-up's deadline, and what a machine of two cores needs beyond it to schedule the threads."""
    leaks: int = 0
    """Slots, leases, reservations, threads, connections, descriptors that were left."""
    recovered_seconds: float | None = None
    """From the end of the fault until something new was written to the tier and read from it."""
    passed: bool = False

    def judge(self) -> None:
        """Set ``passed``."""
        self.passed = (
            self.wrong_bytes == 0
            and self.leaks == 0
            and self.longest_wait_seconds <= self.deadline_seconds
            and self.recovered_seconds is not None
            and self.recovered_seconds <= RECOVERY_SECONDS
        )


ROWS: list[Row] = []
"""Those of this run."""


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for people, in Markdown."""
    lines = [
        "| backend | fault | wrong bytes | longest wait s | deadline s | leaks | used again s | |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        recovered = "never" if row.recovered_seconds is None else f"{row.recovered_seconds:.2f}"
        lines.append(
            f"| {row.backend} | {row.fault} | {row.wrong_bytes} | {row.longest_wait_seconds:.2f} "
            f"| {row.deadline_seconds:.2f} | {row.leaks} | {recovered} | {'ok' if row.passed else 'NOT PASSED'} |"
        )
    return lines


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the report as JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(rows)) + b"\n")
