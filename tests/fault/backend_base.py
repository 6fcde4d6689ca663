"""What a backend of the fault suite is: how it is started, how the tier reaches it, which faults apply to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import faults as f

from kvstrata.testing.proxy import Proxy


class Backend(ABC):
    """A server and the proxies in front of it. A context manager, made anew for every case."""

    name: ClassVar[str]
    faults: ClassVar[list[f.Fault]]
    in_ci: ClassVar[set[str]]
    """Names of the faults that run with every `make test`; all of them do with `make test-faults`."""

    keeps: ClassVar[str] = ""
    """Why threads and descriptors of the process are not counted: what a client library keeps is its own."""

    extra: ClassVar[str] = ""
    """The client library that it wants, if that is not installed with the others."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.proxies: list[Proxy] = []
        self.stack = ExitStack()

    @classmethod
    def missing(cls) -> str | None:
        """Why it cannot be started here, if so."""
        return None

    @classmethod
    def prepare(cls) -> None:
        """Once per run, before anything is counted: have a library make what it never gives back."""
        return

    @abstractmethod
    def start(self) -> None:
        """Start it, with what ``stack`` ends again."""

    @property
    @abstractmethod
    def tier(self) -> dict[str, Any]:
        """What the configuration says of it, without deadlines."""

    def __enter__(self) -> Self:
        for attempt in range(3):
            try:
                with self.stack:
                    self.start()
                    self.stack = self.stack.pop_all()
            except RuntimeError as error:  # a port that was free is somebody else's by now
                if "in use" not in str(error) or attempt == 2:
                    raise
                self.proxies.clear()
            else:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def proxy(self, port: int) -> Proxy:
        """A new proxy in front of a port of this host."""
        proxy = self.stack.enter_context(Proxy(("127.0.0.1", port)))
        self.proxies.append(proxy)
        return proxy
