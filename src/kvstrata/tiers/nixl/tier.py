"""The NIXL tier: the disk tier, with the bytes of its files moved by a backend of NIXL.

Names, budget, eviction, atomic writes and the index are the disk tier's, and so are the files: a directory can be
used by either. It is for storage that NIXL reaches faster than the operating system's calls do; on a plain file
system the disk tier is faster (docs/backends.md has figures).

NIXL's object backends are not supported: NIXL can neither list nor delete objects.
"""

from __future__ import annotations

import os
from typing import ClassVar
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from kvstrata.errors import ConfigError
from kvstrata.tiers.base import TierOptions
from kvstrata.tiers.disk.tier import DiskOptions, DiskTier
from kvstrata.tiers.nixl.agent import Agent


class NixlOptions(TierOptions, frozen=True, kw_only=True):
    """Settings of the NIXL tier. Either ``url``, or ``backend`` and ``path``."""

    url: str = ""
    """``nixl://BACKEND/DIRECTORY`` (``nixl://posix/var/cache/kv``); the other settings may follow as a query."""
    backend: str = "POSIX"
    """A backend of NIXL that moves files: ``POSIX``, ``GDS``, ``GDS_MT`` ..."""
    backend_params: dict[str, str] = msgspec.field(default_factory=dict)
    """Its own parameters, for example ``{use_uring: "true"}``."""
    path: str = ""
    """The directory, as of the disk tier."""
    max_bytes: int = 0
    """Byte budget of all frames in the directory; must be set."""
    shared: bool = False
    """As of the disk tier."""
    fsync: bool = False
    """As of the disk tier."""
    buffer_bytes: int = 256 << 20
    """Memory that is registered with NIXL; at least the largest frame per worker. Taken as it is used."""


class NixlTier(DiskTier):
    """Frames in files, moved by NIXL."""

    kind: ClassVar[str] = "nixl"
    Options: ClassVar[type[TierOptions]] = NixlOptions

    def __init__(self, options: NixlOptions) -> None:
        """Open the directory, and start NIXL's backend.

        Raises:
            ConfigError: a setting cannot be used.
            PluginError: NIXL is missing.
        """
        options = read_url(options)
        if not options.path:
            raise ConfigError("the nixl tier wants a path, or a url as in nixl://posix/var/cache/kv")
        self._backend = options.backend
        self._agent = Agent(
            options.backend, options.backend_params, options.buffer_bytes, options.timeout_seconds
        )
        shared = {
            name: getattr(options, name)
            for name in DiskOptions.__struct_fields__
            if name in NixlOptions.__struct_fields__
        }
        super().__init__(DiskOptions(**shared))

    def _load(self, fd: int, buffer: memoryview, expected: int | None) -> int:  # noqa: ARG002 - asks the file
        size = os.fstat(fd).st_size
        if 0 < size <= len(buffer):
            self._agent.read(fd, buffer[:size])
        return size

    def _save(self, fd: int, frame: memoryview) -> None:
        if len(frame):
            self._agent.write(fd, frame)

    def describe(self) -> str:
        return f"nixl {self._backend} {self._root}"

    def close(self) -> None:
        super().close()
        self._agent.close()


def read_url(options: NixlOptions) -> NixlOptions:
    """The settings with what the URL says.

    Raises:
        ConfigError: it has another form, or sets something unknown or wrong.
    """
    if not options.url:
        return options
    parts = urlsplit(options.url)
    values = msgspec.structs.asdict(options)
    if parts.scheme != "nixl" or not parts.netloc or not parts.path.strip("/"):
        raise ConfigError(
            "url of the nixl tier: expected nixl://BACKEND/DIRECTORY, as in nixl://posix/var/cache/kv"
        )
    values |= {"backend": parts.netloc.upper(), "path": unquote(parts.path)}
    for name, value in parse_qsl(parts.query):
        if name not in values or name in ("url", "backend", "path", "backend_params"):
            raise ConfigError(f"url of the nixl tier: unknown parameter {name!r}")
        values[name] = value
    try:
        return msgspec.convert(values, NixlOptions, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"url of the nixl tier: {error}") from None
