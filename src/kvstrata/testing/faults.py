"""A tier that fails as told: delays, errors, a full device, damaged and swapped frames.

:class:`FaultyTier` stands around another tier, for tests in one process. :class:`ControlledTier` is the same
around a disk tier and takes its faults from a file, so that a test can change them while a server in another
process uses it; :func:`install_plugin` makes it known there as the plug-in ``faulty``.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.tiers.disk import DiskOptions, DiskTier
from kvstrata.types import Miss, MissReason, TierStats

_MAX_SWAPPED = 20


class Faults(msgspec.Struct):
    """What goes wrong. Rates are shares of operations, or of frames read, between 0 and 1."""

    delay_seconds: float = 0.0
    """Every operation takes that much longer."""
    read_delay_seconds: float = 0.0
    """Reads take that much longer still."""
    error_rate: float = 0.0
    """``TierUnavailable`` instead of a result."""
    full: bool = False
    """Writes raise ``TierFull``."""
    lost_rate: float = 0.0
    """A frame that ``contains`` announced is gone when it is read."""
    truncated_rate: float = 0.0
    flipped_rate: float = 0.0
    """One bit of the frame is another."""
    swapped_rate: float = 0.0
    """The frame of another key that was written lately is delivered."""


class FaultyTier(Tier):
    """``inner`` with ``faults``, which may be changed at any time. Chance is seeded."""

    kind: ClassVar[str] = "faulty"

    def __init__(self, inner: Tier, faults: Faults | None = None, *, seed: int = 0) -> None:
        self.inner = inner
        self.faults = faults or Faults()
        self._random = random.Random(seed)  # noqa: S311  chance for tests
        self._lock = threading.Lock()
        self._written: list[str] = []

    def _chance(self, rate: float) -> bool:
        with self._lock:
            return rate > 0 and self._random.random() < rate

    def _below(self, end: int) -> int:
        with self._lock:
            return self._random.randrange(end)

    def _begin(self, *, reading: bool = False) -> Faults:
        """What an operation does first; raises what it is to raise."""
        faults = self.faults
        time.sleep(faults.delay_seconds + (faults.read_delay_seconds if reading else 0.0))
        if self._chance(faults.error_rate):
            raise TierUnavailable("a fault that a test asked for")
        return faults

    def contains(self, keys: Sequence[str]) -> list[bool]:
        self._begin()
        return self.inner.contains(keys)

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        faults = self._begin(reading=True)
        asked = list(keys)
        for position in range(len(keys)):
            if self._written and self._chance(faults.swapped_rate):
                asked[position] = self._written[self._below(len(self._written))]
        results = self.inner.read(asked, buffers)
        return [self._damage(faults, buffer, result) for buffer, result in zip(buffers, results, strict=True)]

    def _damage(self, faults: Faults, buffer: memoryview, result: int | Miss) -> int | Miss:
        if isinstance(result, Miss) or result == 0:
            return result
        if self._chance(faults.lost_rate):
            return Miss(MissReason.ABSENT)
        if self._chance(faults.flipped_rate):
            buffer[self._below(result)] ^= 1 << self._below(8)
        if self._chance(faults.truncated_rate):
            return self._below(result)
        return result

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        if self._begin().full:
            raise TierFull("a fault that a test asked for")
        self.inner.write(keys, frames)
        with self._lock:
            self._written = [*self._written, *keys][-_MAX_SWAPPED:]

    def delete(self, keys: Sequence[str]) -> int:
        self._begin()
        return self.inner.delete(keys)

    def scan(self, prefix: str = "") -> Iterator[str]:
        self._begin()
        return self.inner.scan(prefix)

    def stats(self) -> TierStats:
        self._begin()
        return self.inner.stats()

    def close(self) -> None:
        self.inner.close()


class ControlledOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the controlled tier."""

    path: str
    """Directory of the disk tier inside."""
    faults_file: str
    """JSON of :class:`Faults`, read before every operation; no such file means no faults."""


class ControlledTier(FaultyTier):
    """A disk tier whose faults are in a file."""

    Options: ClassVar[type[TierOptions]] = ControlledOptions

    def __init__(self, options: ControlledOptions) -> None:
        super().__init__(DiskTier(DiskOptions(path=options.path, max_bytes=1 << 30)))
        self._faults_file = Path(options.faults_file)

    def _begin(self, *, reading: bool = False) -> Faults:
        try:
            self.faults = msgspec.json.decode(self._faults_file.read_bytes(), type=Faults)
        except FileNotFoundError:
            self.faults = Faults()
        return super()._begin(reading=reading)


def set_faults(path: Path, faults: Faults) -> None:
    """Change the faults of a controlled tier; its next operation has them."""
    staged = path.with_suffix(".staged")
    staged.write_bytes(msgspec.json.encode(faults))
    staged.replace(path)


def write_plugin(directory: Path) -> None:
    """Write what an installed package would have, that offers :class:`ControlledTier` as tier ``faulty``.

    With ``directory`` in ``sys.path`` (PYTHONPATH for a child process) it is found.
    """
    info = directory / "kvstrata_faulty-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvstrata-faulty\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[kvstrata.tiers]\nfaulty = {__name__}:{ControlledTier.__name__}\n"
    )
