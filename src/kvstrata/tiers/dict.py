"""The reference tier: a dict. It explains the contract, and tests use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from kvstrata.tiers.base import Tier, TierOptions
from kvstrata.types import Miss, MissReason, TierStats


class DictTier(Tier):
    """Frames in a dict of this process, without a budget."""

    kind: ClassVar[str] = "dict"

    def __init__(self, options: TierOptions | None = None) -> None:
        self.options = options or TierOptions()
        self.frames: dict[str, bytes] = {}

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [key in self.frames for key in keys]

    def read(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[int | Miss]:
        results: list[int | Miss] = []
        for key, buffer in zip(keys, buffers, strict=True):
            frame = self.frames.get(key)
            if frame is None:
                results.append(Miss(MissReason.ABSENT))
            elif len(frame) > len(buffer):
                results.append(Miss(MissReason.CORRUPT, f"{len(frame)} bytes for {len(buffer)}"))
            else:
                buffer[: len(frame)] = frame
                results.append(len(frame))
        return results

    def write(self, keys: Sequence[str], frames: Sequence[memoryview]) -> None:
        for key, frame in zip(keys, frames, strict=True):
            self.frames[key] = bytes(frame)

    def delete(self, keys: Sequence[str]) -> int:
        return sum(self.frames.pop(key, None) is not None for key in keys)

    def scan(self, prefix: str = "") -> Iterator[str]:
        return iter([key for key in self.frames if key.startswith(prefix)])

    def stats(self) -> TierStats:
        frames = list(self.frames.values())
        return TierStats(entries=len(frames), used_bytes=sum(map(len, frames)))
