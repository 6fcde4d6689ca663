"""``naive``: the payload as it is."""

from __future__ import annotations

from typing import ClassVar

from kvstrata.codecs.base import Codec
from kvstrata.errors import FrameError
from kvstrata.types import MissReason


class NaiveCodec(Codec):
    """The identity. Frames are read into and written from the L1 slot without a copy."""

    name: ClassVar[str] = "naive"
    passthrough: ClassVar[bool] = True

    def max_encoded_bytes(self, payload_bytes: int) -> int:
        return payload_bytes

    def encode(self, payload: memoryview, into: memoryview) -> int:
        into[: len(payload)] = payload
        return len(payload)

    def decode(self, encoded: memoryview, parameters: str, into: memoryview) -> None:
        del parameters  # there are none
        if len(encoded) != len(into):
            raise FrameError(
                MissReason.CORRUPT, f"{len(encoded)} bytes where a payload of {len(into)} was expected"
            )
        into[:] = encoded
