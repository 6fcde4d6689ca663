"""The contract of codecs, as tests. Subclass it and say how to make one.

class TestMyCodec(CodecContract):
    def make_codec(self) -> Codec:
        return MyCodec()
"""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstrata.codecs.base import Codec, PayloadDescription, Stage, check_parameters, corrupt
from kvstrata.errors import FrameError
from kvstrata.frame import MAX_GROWTH_BYTES
from kvstrata.types import KVLayout, MissReason, PageFormat, PageOrder

DTYPES = ("bfloat16", "float16", "float32", "float64", "uint8", "int8", "float8_e4m3fn", "unheard_of")
"""Element types of layouts; an unknown one is bytes."""
KINDS = ("zeros", "noise", "ramp", "normal", "specials")
"""Contents of payloads."""
_SPECIALS = {
    "bfloat16": struct.pack("<8H", 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x8000, 0x0001, 0x7F81, 0x3F80),
    "float16": struct.pack("<8H", 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x8000, 0x0001, 0x7C01, 0x3C00),
    "float32": struct.pack("<4I", 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001),
}
"""Infinities, NaNs with their payloads, minus zero, subnormals."""
_SIZES = [4096, 49_152, 98_304, 1_100_002]
_SLACK_BYTES = 1 << 16
"""What an attempt to decode may allocate besides what its sizes ask for."""


class ZipCodec(Codec):
    """A small lossless codec for tests: DEFLATE, or the payload itself where that is no smaller."""

    name: ClassVar[str] = "zip"
    stage: ClassVar[Stage] = Stage.COMPRESS

    def max_encoded_bytes(self, what: PayloadDescription) -> int:
        return what.payload_bytes

    def encode(self, payload: memoryview, what: PayloadDescription, into: memoryview) -> int:
        packed = zlib.compress(payload, 1)
        chosen = packed if len(packed) < what.payload_bytes else payload
        into[: len(chosen)] = chosen
        return len(chosen)

    def decode(
        self, encoded: memoryview, what: PayloadDescription, parameters: str, into: memoryview
    ) -> None:
        check_parameters(self.name, parameters, "")
        if len(encoded) == what.payload_bytes:
            into[:] = encoded
            return
        stream = zlib.decompressobj()
        try:
            into[:] = stream.decompress(encoded, what.payload_bytes)
        except (zlib.error, ValueError) as error:
            raise corrupt(self.name, str(error)) from error


def describe_payload(
    payload_bytes: int, dtype: str = "bfloat16", num_layers: int = 1, num_tokens: int = 16
) -> PayloadDescription:
    """A payload of one block per layer; the bytes that do not divide among the layers are the first one's."""
    size, rest = divmod(payload_bytes, num_layers)
    pages = (size + rest, *[size] * (num_layers - 1))
    layout = KVLayout(block_size=num_tokens, page_bytes=pages, dtype=dtype, kernel_format="test")
    return PayloadDescription(layout, num_tokens, payload_bytes, dtype, chunk_hash=bytes(range(32)))


def page_format(order: str, tokens: int, heads: int, dims: int) -> PageFormat:
    """Pages as inference engines have them: "heads" or "tokens" first and then a token's keys and values; "vec", as
    vLLM's CPU attention has them: keys by dim and token; "amx": pairs of dims of 16 tokens, and pairs of tokens.
    """
    content = 2 * dims
    if order in ("heads", "tokens"):
        strides = (content, tokens * content) if order == "heads" else (heads * content, content)
        of_token, of_head = ((tokens, strides[0]),), ((heads, strides[1]),)
        keys, values = (PageOrder(start, of_token, of_head, ((dims, 1),)) for start in (0, dims))
        return PageFormat(keys, values)
    of_head, start = ((heads, tokens * content),), tokens * dims
    if order == "vec":
        keys = PageOrder(0, ((tokens, 1),), of_head, ((dims, tokens),))
        return PageFormat(keys, PageOrder(start, ((tokens, dims),), of_head, ((dims, 1),)))
    keys = PageOrder(0, ((tokens // 16, 16 * dims), (16, 2)), of_head, ((dims // 2, 32), (2, 1)))
    return PageFormat(keys, PageOrder(start, ((tokens // 2, content), (2, 1)), of_head, ((dims, 2),)))


PAGE_ORDERS = ("heads", "tokens", "vec", "amx")


def describe_kv(
    num_tokens: int,
    dtype: str = "bfloat16",
    *,
    order: str = "heads",
    block_size: int = 32,
    layers: int = 2,
    heads: int = 2,
    dims: int = 32,
) -> PayloadDescription:
    """A payload of keys and values that can be unpacked."""
    width = 4 if dtype == "float32" else 2
    pages = (2 * block_size * heads * dims * width,) * layers
    layout = KVLayout(block_size, pages, dtype, order, page_format(order, block_size, heads, dims))
    size = layout.payload_bytes(num_tokens)
    return PayloadDescription(layout, num_tokens, size, dtype, chunk_hash=bytes(range(32)))


def make_payload(size: int, kind: str = "normal", dtype: str = "bfloat16", seed: int = 0) -> bytes:
    """``size`` bytes of a kind of :data:`KINDS`; "normal" has exponents as KV in bf16 has them."""
    source = random.Random(f"{size} {kind} {dtype} {seed}")  # noqa: S311 - a reproducible payload, no secret
    match kind:
        case "zeros":
            return bytes(size)
        case "noise":
            return source.randbytes(size)
        case "normal":
            floats = b"".join(
                struct.pack("<f", source.gauss(0, 1))[2:] for _ in range(min(size, 8192) // 2 + 1)
            )
            return (floats * (size // len(floats) + 1))[:size]
        case "specials":
            specials = _SPECIALS.get(dtype, bytes(range(256)))
            return (specials * (size // len(specials) + 1))[:size]
        case _:
            return bytes(range(256)) * (size // 256) + bytes(size % 256)


class CodecContract:
    """What ``cache.io`` relies on. A lossy codec overrides ``check_equal``, one that wants layouts ``describe``."""

    def make_codec(self) -> Codec:
        """The codec under test, able to encode."""
        raise NotImplementedError

    def describe(
        self, payload_bytes: int, dtype: str = "bfloat16", num_layers: int = 1
    ) -> PayloadDescription:
        """What the payload of a test is said to be."""
        return describe_payload(payload_bytes, dtype, num_layers)

    def check_equal(self, decoded: bytes, payload: bytes) -> None:
        """Whether ``decoded`` is good enough for ``payload``; exactly equal unless overridden."""
        assert decoded == payload

    def encode(self, codec: Codec, payload: bytes, what: PayloadDescription | None = None) -> bytes:
        what = what or self.describe(len(payload))
        into = bytearray(b"\x5a" * codec.max_encoded_bytes(what))
        written = codec.encode(memoryview(payload), what, memoryview(into))
        assert 0 <= written <= len(into)
        return bytes(into[:written])

    def decode(
        self, codec: Codec, encoded: bytes, payload_bytes: int, what: PayloadDescription | None = None
    ) -> bytes:
        what = what or self.describe(payload_bytes)
        into = bytearray(b"\xa5" * payload_bytes)
        codec.decode(memoryview(encoded), what, codec.parameters, memoryview(into))
        assert len(into) == payload_bytes
        return bytes(into)

    def test_name_and_parameters_fit_into_the_header(self) -> None:
        codec = self.make_codec()
        assert 0 < len(codec.name.encode("ascii")) <= 16
        assert len(codec.parameters.encode("ascii")) <= 32

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", _SIZES)
    def test_round_trip(self, size: int, kind: str) -> None:
        codec = self.make_codec()
        payload = make_payload(size, kind)
        self.check_equal(self.decode(codec, self.encode(codec, payload), size), payload)

    @settings(max_examples=60, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        size=st.integers(0, 70_000) | st.integers(0, 40),
        dtype=st.sampled_from(DTYPES),
        num_layers=st.integers(1, 4),
        kind=st.sampled_from(KINDS),
        seed=st.integers(0, 1000),
    )
    def test_any_type_size_and_layout(
        self, size: int, dtype: str, num_layers: int, kind: str, seed: int
    ) -> None:
        codec = self.make_codec()
        payload = make_payload(size, kind, dtype, seed)
        what = self.describe(size, dtype, num_layers)
        encoded = self.encode(codec, payload, what)
        assert codec.max_encoded_bytes(what) <= size + MAX_GROWTH_BYTES
        self.check_equal(self.decode(codec, encoded, size, what), payload)

    def test_passthrough_is_the_identity(self) -> None:
        codec = self.make_codec()
        if codec.passthrough:
            payload = make_payload(4096, "noise")
            assert codec.max_encoded_bytes(self.describe(4096)) == 4096
            assert self.encode(codec, payload) == payload

    def test_encode_leaves_the_payload_and_works_in_a_larger_buffer(self) -> None:
        codec = self.make_codec()
        payload = bytearray(make_payload(49_152, "ramp"))
        what = self.describe(len(payload))
        into = bytearray(codec.max_encoded_bytes(what) + 100)
        written = codec.encode(memoryview(payload), what, memoryview(into))
        assert payload == make_payload(49_152, "ramp")
        self.check_equal(self.decode(codec, bytes(into[:written]), len(payload)), bytes(payload))

    def test_it_works_in_parts_of_larger_buffers_at_odd_addresses(self) -> None:
        codec = self.make_codec()
        payload = make_payload(8_194, "normal")
        what = self.describe(len(payload))
        room = memoryview(bytearray(b"\x11" * (codec.max_encoded_bytes(what) + 9)))
        source = memoryview(b"\x22" + payload)[1:]
        written = codec.encode(source, what, room[3:-6])
        target = memoryview(bytearray(b"\x33" * (len(payload) + 8)))
        codec.decode(room[3 : 3 + written], what, codec.parameters, target[5:-3])
        self.check_equal(bytes(target[5:-3]), payload)
        assert bytes(room[:3]) + bytes(room[-6:]) == b"\x11" * 9
        assert bytes(target[:5]) + bytes(target[-3:]) == b"\x33" * 8

    @pytest.mark.parametrize("keep", [0, 1, -1])
    def test_truncated_is_a_frame_error(self, keep: int) -> None:
        codec = self.make_codec()
        for kind in ("noise", "normal"):
            encoded = self.encode(codec, make_payload(4096, kind))
            with pytest.raises(FrameError) as caught:
                self.decode(codec, encoded[:keep], 4096)
            assert caught.value.reason in set(MissReason)

    def test_another_payload_size_is_a_frame_error(self) -> None:
        codec = self.make_codec()
        for kind in ("noise", "normal"):
            encoded = self.encode(codec, make_payload(4096, kind))
            for size in (2048, 8192):
                with pytest.raises(FrameError):
                    self.decode(codec, encoded, size)

    def test_parameters_of_another_version_are_a_frame_error(self) -> None:
        codec = self.make_codec()
        encoded = self.encode(codec, make_payload(4096, "normal"))
        into = memoryview(bytearray(4096))
        for parameters in ("v999", "v1+v1+v1+v1", "\ufffd" * 32):
            with pytest.raises(FrameError) as caught:
                codec.decode(memoryview(encoded), self.describe(4096), parameters, into)
            assert caught.value.reason in {MissReason.UNKNOWN_CODEC, MissReason.UNDECRYPTABLE}

    @pytest.mark.parametrize("rounds", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
    def test_damaged_and_foreign_bytes_raise_nothing_but_frame_errors(self, rounds: int) -> None:
        """And allocate no more than the payload's and the frame's sizes ask for, whatever the bytes say."""
        codec = self.make_codec()
        size = 4096
        what = self.describe(size)
        encodings = [self.encode(codec, make_payload(size, kind)) for kind in KINDS]
        source = random.Random(3)  # noqa: S311 - reproducible, no secret
        limit = 4 * (size + MAX_GROWTH_BYTES) + _SLACK_BYTES
        tracemalloc.start()
        try:
            for _ in range(rounds):
                candidate = memoryview(_damage(source, encodings))
                # Once in many thousands the interpreter's table of interned strings grows: 2 MB that are not ours.
                assert any(_decode_peak_bytes(codec, candidate, what) < limit for _ in range(2))
        finally:
            tracemalloc.stop()

    def test_one_instance_serves_many_threads(self) -> None:
        codec = self.make_codec()

        def round_trip(size: int) -> None:
            payload = make_payload(size, "normal")
            self.check_equal(self.decode(codec, self.encode(codec, payload), size), payload)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(round_trip, [4096 * (1 + number % 9) for number in range(40)]))


def _decode_peak_bytes(codec: Codec, candidate: memoryview, what: PayloadDescription) -> int:
    """What an attempt to decode allocates at most at a time, while allocations are traced."""
    into = memoryview(bytearray(what.payload_bytes))
    tracemalloc.reset_peak()
    before, _peak = tracemalloc.get_traced_memory()
    with contextlib.suppress(FrameError):
        codec.decode(candidate, what, codec.parameters, into)
    return tracemalloc.get_traced_memory()[1] - before


def _damage(source: random.Random, encodings: list[bytes]) -> bytes:
    """An encoding with some bytes changed, cut, doubled or grown; or bytes of no origin."""
    data = bytearray(source.choice(encodings))
    match source.randrange(6):
        case 0:
            return source.randbytes(source.randrange(200))
        case 1:
            return bytes(data[: source.randrange(len(data) + 1)])
        case 2:
            return bytes(data) + source.randbytes(source.randrange(1, 64))
        case 3:
            at = source.randrange(min(64, len(data)) or 1)  # where headers are
            data[at : at + 8] = source.choice((b"\xff" * 8, bytes(8), source.randbytes(8)))
            return bytes(data)
        case _:
            for _ in range(source.randrange(1, 8)):
                data[source.randrange(len(data))] ^= 1 << source.randrange(8)
            return bytes(data)
