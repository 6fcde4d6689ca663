"""Frames of every codec as some version wrote them, which every later version must read.

    python tests/codecs/golden_frames.py SET CODEC...

adds ``golden/SET/CODEC.PAYLOAD.frame`` for each payload that the codec takes. What is there is never made anew: a
codec whose encoding changes gets new parameters and frames in a new set. A lossy codec also gets ``.decoded`` files
beside its frames.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvstrata.cache.frames import Transfer, accept_frame, encode_frame, prepare
from kvstrata.codecs.naive import NaiveCodec
from kvstrata.codecs.open import Decoders, open_codec
from kvstrata.codecs.pages import ELEMENTS
from kvstrata.frame import HEADER_BYTES, MAX_GROWTH_BYTES, FrameHeader
from kvstrata.testing.codec import page_format
from kvstrata.types import KVLayout

GOLDEN = Path(__file__).parent / "golden"
KEY_FILE = GOLDEN / "keys"
DTYPES = {"kv": "bfloat16", "noise": "bfloat16", "bytes": "uint8", "floats": "float32"}
"""The payloads, ``golden/NAME.payload``, and the element type that they are said to have."""


def payload_of(name: str) -> bytes:
    return (GOLDEN / f"{name}.payload").read_bytes()


def transfer(name: str) -> Transfer:
    """Two blocks of 16 tokens in two layers, into an empty slot. Where elements are floats, pages have one head."""
    size = len(payload_of(name))
    dtype = DTYPES[name]
    layout = KVLayout(
        block_size=16,
        page_bytes=(size // 4, size // 4),
        dtype=dtype,
        kernel_format="golden",
        pages=page_format("heads", 16, 1, size // 128 // ELEMENTS[dtype].itemsize)
        if dtype in ELEMENTS
        else "",
    )
    expected = FrameHeader(
        shard=1,
        first_token=64,
        num_tokens=32,
        block_size=16,
        payload_bytes=size,
        encoded_bytes=size,
        layout_fingerprint=layout.fingerprint,
        chunk_hash=bytes(range(32)),
        tokens_hash=bytes(range(32, 64)),
        payload_checksum=b"",
        created_at=1_795_000_000,
        codec=NaiveCodec.name,
        dtype=layout.dtype,
    )
    room = memoryview(bytearray(HEADER_BYTES + size + MAX_GROWTH_BYTES))
    return Transfer("key", room[: HEADER_BYTES + size], expected, layout, room)


def decode(frame: bytes, name: str, decoders: Decoders) -> bytes:
    """The payload that a frame holds."""
    into = transfer(name)
    miss = accept_frame(into, memoryview(bytearray(frame)), decoders)
    assert miss is None, miss
    return bytes(into.payload)


def main(golden_set: str, spellings: list[str]) -> None:
    directory = GOLDEN / golden_set
    directory.mkdir(exist_ok=True)
    keys = {"key_file": str(KEY_FILE)}
    KEY_FILE.chmod(0o600)
    for spelling in spellings:
        codec = open_codec(spelling, keys)
        for name in DTYPES:
            path = directory / f"{codec.name}.{name}.frame"
            stored = transfer(name)
            if path.exists() or codec.why_not(stored.layout):
                continue
            prepare(stored)
            stored.payload[:] = payload_of(name)
            path.write_bytes(encode_frame(stored, codec))
            if not codec.lossless:
                path.with_suffix(".decoded").write_bytes(decode(path.read_bytes(), name, Decoders(keys)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
