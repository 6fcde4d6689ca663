"""Several codecs, one after the other: ``zstd+aesgcm`` compresses, then encrypts.

The encoded payload begins with the sizes of what each codec but the last made (64 bits each, little-endian), so
that decoding knows the size of every step before it allocates.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvstrata.codecs.base import Codec, PayloadDescription, corrupt
from kvstrata.errors import FrameError
from kvstrata.types import KVLayout, MissReason

SEPARATOR = "+"
_SIZE = struct.Struct("<Q")


class ChainCodec(Codec):
    """Each codec encodes what the one before it made."""

    def __init__(self, codecs: Sequence[Codec]) -> None:
        """``codecs`` in the order of encoding; at least two, of ascending stages."""
        super().__init__()
        self.codecs = tuple(codecs)
        self.name = SEPARATOR.join(codec.name for codec in codecs)  # type: ignore[misc]
        self.stage = codecs[0].stage  # type: ignore[misc]
        self.lossless = all(codec.lossless for codec in codecs)  # type: ignore[misc]
        self._sizes_bytes = _SIZE.size * (len(codecs) - 1)

    @property
    def parameters(self) -> str:
        return SEPARATOR.join(codec.parameters for codec in self.codecs)

    @property
    def encrypts(self) -> bool:
        return self.codecs[-1].encrypts

    def why_not(self, layout: KVLayout) -> str:
        return self.codecs[0].why_not(layout)

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        for codec in self.codecs:
            what = what.encoded(codec.max_encoded_bytes(what))
        return self._sizes_bytes + what.payload_bytes

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        for index, codec in enumerate(self.codecs[:-1]):
            scratch = memoryview(bytearray(codec.max_encoded_bytes(what)))
            payload = scratch[: codec.encode(payload, what, scratch)]
            what = what.encoded(len(payload))
            _SIZE.pack_into(into, index * _SIZE.size, len(payload))
        return self._sizes_bytes + self.codecs[-1].encode(payload, what, into[self._sizes_bytes :])

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        texts = parameters.split(SEPARATOR)
        if len(texts) != len(self.codecs):
            raise FrameError(
                MissReason.UNKNOWN_CODEC, f"{len(self.codecs)} codecs with parameters {parameters!r}"
            )
        steps = self._steps(encoded, what)
        data = encoded[self._sizes_bytes :]
        for codec, text, step in reversed(list(zip(self.codecs, texts, steps, strict=True))):
            target = into if step is what else memoryview(bytearray(step.payload_bytes))
            codec.decode(data, step, text, target)
            data = target

    def _steps(self, encoded: memoryview, what: PayloadDescription) -> list[PayloadDescription]:
        """What each codec encoded, from the sizes in front; none is larger than its codec can make it."""
        if len(encoded) < self._sizes_bytes:
            raise corrupt(self.name, f"only {len(encoded)} bytes")
        steps = [what]
        for codec, (size,) in zip(self.codecs, _SIZE.iter_unpack(encoded[: self._sizes_bytes]), strict=False):
            if size > codec.max_encoded_bytes(steps[-1]):
                raise corrupt(self.name, f"{size} bytes cannot come from {codec.name}")
            steps.append(steps[-1].encoded(size))
        return steps
