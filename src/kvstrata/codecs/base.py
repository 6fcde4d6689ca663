"""The codec contract."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import msgspec

from kvstrata.errors import FrameError
from kvstrata.types import KVLayout, MissReason

_ELEMENT_BYTES = {
    "float64": 8, "int64": 8, "uint64": 8, "complex64": 8,
    "float32": 4, "int32": 4, "uint32": 4,
    "bfloat16": 2, "float16": 2, "int16": 2, "uint16": 2,
}  # fmt: skip


class CodecOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The settings of a codec; each adds its own in a subclass. The first is what ``NAME:VALUE`` sets.

    They decide how it encodes. Decoding depends on the frame alone (and on keys, for encryption).
    """


class Stage(enum.IntEnum):
    """What a codec does to a payload. In a chain each codec is of a later stage than the one before it."""

    STORE = 0
    """Nothing; stands alone."""
    QUANTISE = 1
    """Keeps less than there was; wants to know what the elements mean."""
    COMPRESS = 2
    ENCRYPT = 3


class PayloadDescription(msgspec.Struct, frozen=True):
    """What a payload is: the same when it is encoded and when it is decoded.

    The frame header has all of it, or a fingerprint of it, and a frame whose header differs never gets to a codec.
    """

    layout: KVLayout
    num_tokens: int
    payload_bytes: int
    """Size of what this codec encodes: the payload, or in a chain what the codec before it made of that."""
    dtype: str
    """Element type of it: the layout's, or "uint8" for what another codec made."""
    shard: int = 0
    group: int = 0
    first_token: int = 0
    chunk_hash: bytes = bytes(32)
    """Says which model, salt and tokens; with ``shard`` and ``group`` it is the entry's identity."""
    codec: str = ""
    """Name of the frame's codec, the whole chain."""
    codec_parameters: str = ""
    """The whole chain's."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one element; 1 for types that are not known."""
        return _ELEMENT_BYTES.get(self.dtype, 1)

    def encoded(self, encoded_bytes: int) -> PayloadDescription:
        """The same for ``encoded_bytes`` bytes that a codec made of this payload: what the next in a chain gets."""
        return msgspec.structs.replace(self, payload_bytes=encoded_bytes, dtype="uint8")


class Codec(ABC):
    """Turns a payload into the bytes that a tier stores, and back.

    Threading: one instance serves many threads at once; calls keep no state. They run on the I/O threads of a tier
    and should release the GIL for what takes long.
    Memory: a call needs at most a few times the payload, and never more than a frame's declared sizes ask for.
    Independence: a chunk is decodable on its own, by its frame header, whatever codec the reader writes with.
    Growth: ``max_encoded_bytes`` is at most ``payload_bytes + frame.MAX_GROWTH_BYTES``, also of a chain.
    Header: ``name`` is at most 16 ASCII characters, ``parameters`` at most 32, without ``+``; of a chain they are
    joined by ``+``. ``parameters`` begins with the version of the encoding.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    lossless: ClassVar[bool] = True
    passthrough: ClassVar[bool] = False
    """True when the encoded payload is the payload itself, so that frames need no scratch buffer."""
    Options: ClassVar[type[CodecOptions]] = CodecOptions
    """The settings this codec understands."""

    def __init__(self, options: Any = None) -> None:  # noqa: B027  most codecs have no options
        """``options`` is an ``Options``; without any the codec decodes, and encodes by its defaults if it can."""

    @property
    def parameters(self) -> str:
        """What ``decode`` must know besides the payload's description.

        Raises:
            ConfigError: this instance cannot encode (it lacks a key, say); asked for at start.
        """
        return ""

    @property
    def encrypts(self) -> bool:
        """Whether only holders of a key can read, or make, what it encodes."""
        return self.stage is Stage.ENCRYPT

    def why_not(self, layout: KVLayout) -> str:
        """Why KV of this layout cannot be encoded, in one line; empty when it can. Asked when an engine registers.

        A lossless codec takes everything.
        """
        del layout
        return ""

    @abstractmethod
    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        """The largest size that ``encode`` can produce for such a payload."""

    @abstractmethod
    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        """Encode ``payload`` to the start of ``into``; return the number of bytes written.

        Both are contiguous bytes; ``into`` has room for ``max_encoded_bytes(what)``, the payload stays as it is.
        """

    @abstractmethod
    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        """Decode ``encoded`` so that it fills ``into``, ``what.payload_bytes`` bytes, exactly.

        ``encoded`` and ``into`` do not overlap. After an error the content of ``into`` is undefined.

        Raises:
            FrameError: the bytes are not what ``encode`` makes of such a payload; its reason is ``corrupt``,
                ``unknown_codec`` (for ``parameters`` of another version) or ``undecryptable``.
        """


def check_parameters(codec: str, parameters: str, known: str) -> None:
    """For codecs with one version and no parameters.

    Raises:
        FrameError: ``parameters`` are others than ``known``.
    """
    if parameters != known:
        raise FrameError(
            MissReason.UNKNOWN_CODEC, f"codec {codec} with parameters {parameters!r} is not known here"
        )


def corrupt(codec: str, reason: str) -> FrameError:
    """The error for bytes that ``codec`` did not make."""
    return FrameError(MissReason.CORRUPT, f"codec {codec}: {reason}")
