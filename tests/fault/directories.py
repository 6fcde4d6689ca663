"""Tiers whose entries are files."""

from __future__ import annotations

import importlib.util
import itertools
import resource
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


@contextmanager
def _gone(backend: Directory) -> Iterator[None]:
    away = backend.root.with_name("away")
    backend.root.rename(away)
    yield
    for number in itertools.count():
        try:
            away.rename(backend.root)
        except OSError:  # made anew meanwhile
            backend.root.rename(backend.root.with_name(f"other{number}"))
        else:
            break


@contextmanager
def _file_in_its_place(backend: Directory) -> Iterator[None]:
    away = backend.root.with_name("away")
    backend.root.rename(away)
    backend.root.write_text("not a directory")
    yield
    backend.root.unlink()
    away.rename(backend.root)


@contextmanager
def _full(_: Directory) -> Iterator[None]:
    """No file may grow beyond 4 KiB, and every frame is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


DIRECTORY = [
    *f.STORED,
    *f.MACHINE,
    f.Fault("all files removed", _removed),
    f.Fault("directory gone", _gone),
    f.Fault("a file in its place", _file_in_its_place),
    f.Fault("no room to write", _full),
]


class Disk(Directory):
    name = "disk"
    faults: ClassVar = DIRECTORY
    in_ci: ClassVar = {"values of a wrong length"}

    def start(self) -> None:
        self.root = self.directory / "kv"

    @property
    def tier(self) -> dict[str, Any]:
        return {"kind": "disk", "path": str(self.root), "max_bytes": 1 << 30}


class SharedDirectory(Directory):
    name = "file (shared directory)"
    faults: ClassVar = DIRECTORY
    in_ci: ClassVar = {"clock steps"}

    def start(self) -> None:
        self.root = self.directory / "shared"
        self.root.mkdir()

    @property
    def tier(self) -> dict[str, Any]:
        return {"kind": "file", "path": str(self.root), "max_bytes": 1 << 30}


class Nixl(Directory):
    """The disk tier's files, moved by NIXL's POSIX backend."""

    name = "nixl"
    faults: ClassVar = DIRECTORY
    in_ci: ClassVar = set()
    keeps: ClassVar = "NIXL keeps its event descriptors"
    extra: ClassVar = "nixl"

    @classmethod
    def missing(cls) -> str | None:
        return None if importlib.util.find_spec("nixl_cu12") else "wants kvstrata[nixl] (make test-extras)"

    def start(self) -> None:
        self.root = self.directory / "kv"

    @property
    def tier(self) -> dict[str, Any]:
        return {"url": f"nixl://posix{self.root}?max_bytes={1 << 30}&buffer_bytes={32 << 20}"}
