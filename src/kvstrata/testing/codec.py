"""The contract of codecs, as tests. Subclass it and say how to make one.

class TestMyCodec(CodecContract):
    def make_codec(self) -> Codec:
        return MyCodec()
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstrata.codecs.base import Codec
from kvstrata.errors import FrameError
from kvstrata.types import MissReason

_SIZES = [4096, 49_152, 98_304, 1_000_002]


def _payload(size: int, kind: str) -> bytes:
    if kind == "zeros":
        return bytes(size)
    if kind == "noise":
        return random.Random(size).randbytes(size)  # noqa: S311 - a reproducible payload, no secret
    return bytes(range(256)) * (size // 256) + bytes(size % 256)


class CodecContract:
    """What ``cache.io`` relies on. A lossy codec overrides ``check_equal``."""

    def make_codec(self) -> Codec:
        """The codec under test."""
        raise NotImplementedError

    def check_equal(self, decoded: bytes, payload: bytes) -> None:
        """Whether ``decoded`` is good enough for ``payload``; exactly equal unless overridden."""
        assert decoded == payload

    def encode(self, codec: Codec, payload: bytes) -> bytes:
        into = bytearray(codec.max_encoded_bytes(len(payload)))
        written = codec.encode(memoryview(payload), memoryview(into))
        assert 0 < written <= len(into)
        return bytes(into[:written])

    def decode(self, codec: Codec, encoded: bytes, payload_bytes: int) -> bytes:
        into = bytearray(b"\xa5" * payload_bytes)
        codec.decode(memoryview(encoded), codec.parameters, memoryview(into))
        assert len(into) == payload_bytes
        return bytes(into)

    def test_name_and_parameters_fit_into_the_header(self) -> None:
        codec = self.make_codec()
        assert 0 < len(codec.name.encode("ascii")) <= 16
        assert len(codec.parameters.encode("ascii")) <= 32

    @pytest.mark.parametrize("kind", ["zeros", "noise", "ramp"])
    @pytest.mark.parametrize("size", _SIZES)
    def test_round_trip(self, size: int, kind: str) -> None:
        codec = self.make_codec()
        payload = _payload(size, kind)
        self.check_equal(self.decode(codec, self.encode(codec, payload), size), payload)

    def test_passthrough_is_the_identity(self) -> None:
        codec = self.make_codec()
        if codec.passthrough:
            payload = _payload(4096, "noise")
            assert codec.max_encoded_bytes(4096) == 4096
            assert self.encode(codec, payload) == payload

    def test_encode_leaves_the_payload_and_works_in_a_larger_buffer(self) -> None:
        codec = self.make_codec()
        payload = bytearray(_payload(49_152, "ramp"))
        into = bytearray(codec.max_encoded_bytes(len(payload)) + 100)
        written = codec.encode(memoryview(payload), memoryview(into))
        assert payload == _payload(49_152, "ramp")
        self.check_equal(self.decode(codec, bytes(into[:written]), len(payload)), bytes(payload))

    @pytest.mark.parametrize("keep", [0, 1, -1])
    def test_truncated_is_a_frame_error(self, keep: int) -> None:
        codec = self.make_codec()
        encoded = self.encode(codec, _payload(4096, "noise"))
        with pytest.raises(FrameError) as caught:
            self.decode(codec, encoded[:keep], 4096)
        assert caught.value.reason in set(MissReason)

    def test_another_payload_size_is_a_frame_error(self) -> None:
        codec = self.make_codec()
        encoded = self.encode(codec, _payload(4096, "noise"))
        for size in (2048, 8192):
            with pytest.raises(FrameError):
                self.decode(codec, encoded, size)

    def test_foreign_bytes_raise_nothing_but_frame_errors(self) -> None:
        codec = self.make_codec()
        encoded = self.encode(codec, _payload(4096, "ramp"))
        source = random.Random(3)  # noqa: S311 - reproducible, no secret
        for _ in range(200):
            damaged = bytearray(encoded)
            damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
            for candidate in (bytes(damaged), source.randbytes(len(encoded))):
                try:
                    self.decode(codec, candidate, 4096)
                except FrameError:
                    continue

    def test_one_instance_serves_many_threads(self) -> None:
        codec = self.make_codec()

        def round_trip(size: int) -> None:
            payload = _payload(size, "noise")
            self.check_equal(self.decode(codec, self.encode(codec, payload), size), payload)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(round_trip, [4096 * (1 + number % 9) for number in range(40)]))
