"""Looking into a tier from outside: opening it as it is, and one stored frame of which nothing is known."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvstrata.config import TierConfig
from kvstrata.errors import ConfigError, FrameError
from kvstrata.frame import HEADER_BYTES, FrameHeader, payload_checksum
from kvstrata.tiers.base import Tier
from kvstrata.tiers.open import open_tier
from kvstrata.types import Miss

MAX_FRAME_BYTES = 4 << 30


@contextlib.contextmanager
def opened_tier(config: TierConfig) -> Iterator[Tier]:
    """The tier that ``config`` describes, for a look. Makes no directory that is not there.

    Raises:
        ConfigError, PluginError: there is none, or it cannot be opened.
    """
    path = config.options.get("path")
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"tier {config.name}: there is no directory {path}")
    with contextlib.closing(open_tier(config)) as tier:
        yield tier


class StoredFrame(msgspec.Struct, frozen=True):
    """What lies under a key."""

    frame_bytes: int
    header: FrameHeader | None
    """None when it cannot be read."""
    fault: str = ""
    """What is wrong with it; empty when it is intact."""


def inspect_frame(tier: Tier, key: str) -> StoredFrame | Miss:
    """Read the frame under ``key`` and check its checksums. Takes as much memory as the frame is large."""
    # The size is not known before: address space for the largest frame; only pages that are read take memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    with mmap.mmap(-1, MAX_FRAME_BYTES, flags=flags) as space, memoryview(space) as buffer:
        (size,) = tier.read([key], [buffer])
        if isinstance(size, Miss):
            return size
        with buffer[:size] as frame:
            return _checked(frame)


def _checked(frame: memoryview) -> StoredFrame:
    try:
        header = FrameHeader.unpack(frame)
    except FrameError as error:
        return StoredFrame(len(frame), None, str(error))
    with frame[HEADER_BYTES:] as encoded:
        if len(encoded) != header.encoded_bytes:
            fault = f"{len(encoded)} bytes of payload, {header.encoded_bytes} announced"
        elif payload_checksum(encoded) != header.payload_checksum:
            fault = "the payload's checksum is wrong"
        else:
            fault = ""
    return StoredFrame(len(frame), header, fault)
