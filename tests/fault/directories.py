"""Tiers whose entries are files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import faults as f
from backend_base import Backend


@contextmanager
def _removed(backend: Disk) -> Iterator[None]:
    for path in backend.files():
        path.unlink(missing_ok=True)
    yield


class Directory(Backend):
    """Entries are files."""

    root: Path

    def files(self) -> list[Path]:
        return [path for path in self.root.rglob("*.kv") if path.is_file()]

    def entries(self) -> list[str]:
        return [str(path) for path in self.files()]

    def get(self, name: str) -> bytes | None:
        try:
            return Path(name).read_bytes()
        except FileNotFoundError:
            return None

    def put(self, name: str, value: bytes) -> None:
        Path(name).write_bytes(value)


DIRECTORY = [*f.STORED, *f.MACHINE, f.Fault("all files removed", _removed)]


class Disk(Directory):
    name = "disk"
    faults: ClassVar = DIRECTORY
    in_ci: ClassVar = {"values of a wrong length"}

    def start(self) -> None:
        self.root = self.directory / "kv"

    @property
    def tier(self) -> dict[str, Any]:
        return {"kind": "disk", "path": str(self.root), "max_bytes": 1 << 30}
