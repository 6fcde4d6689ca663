"""The codec contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar


class Codec(ABC):
    """Turns a payload into the bytes that a tier stores, and back.

    One instance serves many threads at once: ``encode`` and ``decode`` keep no state between calls.
    A chunk is decodable on its own. ``name`` is at most 16 ASCII characters, ``parameters`` at most 32;
    both go into the frame header, and a reader decodes by what it finds there.
    """

    name: ClassVar[str]
    passthrough: ClassVar[bool] = False
    """True when the encoded payload is the payload itself, so that frames need no scratch buffer."""

    @property
    def parameters(self) -> str:
        """What ``decode`` must know besides the payload size."""
        return ""

    @abstractmethod
    def max_encoded_bytes(self, payload_bytes: int) -> int:
        """The largest size that ``encode`` can produce for a payload of that size."""

    @abstractmethod
    def encode(self, payload: memoryview, into: memoryview) -> int:
        """Encode ``payload`` to the start of ``into``; return the number of bytes written."""

    @abstractmethod
    def decode(self, encoded: memoryview, parameters: str, into: memoryview) -> None:
        """Decode ``encoded`` so that it fills ``into`` exactly.

        Raises:
            FrameError: the bytes are not what ``encode`` makes of a payload of that size.
        """
