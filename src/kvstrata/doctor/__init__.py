"""Is this machine, and this configuration, fit for production? Each check says what it found and what to do."""

from __future__ import annotations

from kvstrata.doctor.examine import examine
from kvstrata.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine"]
