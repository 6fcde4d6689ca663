"""``naive``: the payload as it is."""

from __future__ import annotations

from typing import ClassVar

from kvstrata.codecs.base import Codec, PayloadDescription, Stage, check_parameters, corrupt


class NaiveCodec(Codec):
    """The identity. Frames are read into and written from the L1 slot without a copy."""

    name: ClassVar[str] = "naive"
    stage: ClassVar[Stage] = Stage.STORE
    passthrough: ClassVar[bool] = True

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        return what.payload_bytes

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        into[: what.payload_bytes] = payload
        return what.payload_bytes

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        check_parameters(self.name, parameters, "")
        if len(encoded) != what.payload_bytes:
            raise corrupt(self.name, f"{len(encoded)} bytes for a payload of {what.payload_bytes}")
        into[:] = encoded
