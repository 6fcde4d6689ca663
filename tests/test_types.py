"""What is shared and what it stands for."""

from __future__ import annotations

import msgspec

from kvstrata.protocol import messages as m
from kvstrata.testing.codec import describe_kv, page_format
from kvstrata.types import KVLayout, Namespace

OPAQUE = KVLayout(block_size=16, page_bytes=(4096, 4096), dtype="bfloat16", kernel_format="K page")
DESCRIBED = msgspec.structs.replace(OPAQUE, pages=page_format("vec", 16, 2, 32))


def namespace(layout: KVLayout) -> Namespace:
    return Namespace("vllm", "org/model", "1", "auto", 1, "one", 64, layout)


def test_fingerprints_are_those_of_earlier_versions() -> None:
    """They are in every key and frame that is stored anywhere."""
    assert OPAQUE.fingerprint.hex() == "224ce1fdc14a70bb06ad70483d8fb3d0"
    assert namespace(OPAQUE).fingerprint.hex() == (
        "8d1ce314972d4e32a7e6d567bc6071a8ebefc0f5c066a7364172a68291054aea"
    )


def test_how_a_page_unpacks_is_no_part_of_fingerprints() -> None:
    for layout in (DESCRIBED, msgspec.structs.replace(OPAQUE, pages="nobody knows")):
        assert layout.fingerprint == OPAQUE.fingerprint
        assert namespace(layout).fingerprint == namespace(OPAQUE).fingerprint
    assert msgspec.structs.replace(DESCRIBED, dtype="float16").fingerprint != OPAQUE.fingerprint


def test_how_a_page_unpacks_travels_and_is_no_must() -> None:
    encoder = msgspec.msgpack.Encoder()
    decoder: msgspec.msgpack.Decoder[m.Register] = msgspec.msgpack.Decoder(m.Register)
    for order in ("heads", "amx"):
        message = m.Register(namespace(describe_kv(32, order=order).layout))
        assert decoder.decode(encoder.encode(message)) == message
    # To a server that knows the field, from one that does not; and the other way round.
    assert b"pages" not in encoder.encode(m.Register(namespace(OPAQUE)))
    assert b"pages" in encoder.encode(m.Register(namespace(DESCRIBED)))

    class EarlierLayout(msgspec.Struct, frozen=True):
        block_size: int
        page_bytes: tuple[int, ...]
        dtype: str
        kernel_format: str

    earlier = msgspec.msgpack.decode(encoder.encode(DESCRIBED), type=EarlierLayout)
    assert earlier.kernel_format == DESCRIBED.kernel_format
