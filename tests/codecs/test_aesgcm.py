"""Encryption at rest: keys, rotation, binding to the entry."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec
import pytest

from kvstrata.codecs.aesgcm import AESGCMCodec, AESGCMOptions
from kvstrata.codecs.base import Codec, PayloadDescription
from kvstrata.codecs.keys import KeyRing
from kvstrata.codecs.open import Decoders, open_codec
from kvstrata.errors import ConfigError, FrameError
from kvstrata.testing.codec import CodecContract, describe_payload, make_payload
from kvstrata.types import MissReason

SIZE = 5000
PAYLOAD = make_payload(SIZE)
WHAT = describe_payload(SIZE)


def key_file(directory: Path, *keys: str, mode: int = 0o600) -> str:
    path = directory / f"keys-{secrets.token_hex(4)}"
    path.write_text("# keys\n\n" + "".join(f"{key}  # one\n" for key in keys))
    path.chmod(mode)
    return str(path)


def codec(path: str | None) -> AESGCMCodec:
    return AESGCMCodec(AESGCMOptions(key_file=path))


def encoded_by(by: Codec, what: PayloadDescription = WHAT) -> memoryview:
    into = memoryview(bytearray(by.max_encoded_bytes(what)))
    return into[: by.encode(memoryview(PAYLOAD), what, into)]


def decoded_by(by: Codec, encoded: memoryview, parameters: str, what: PayloadDescription = WHAT) -> bytearray:
    into = bytearray(what.payload_bytes)
    by.decode(encoded, what, parameters, memoryview(into))
    return into


class TestAESGCMContract(CodecContract):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _keys(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.path = key_file(tmp_path_factory.mktemp("keys"), "ab" * 32)

    def make_codec(self) -> Codec:
        return codec(self.path)


class TestCompressedAndEncryptedContract(TestAESGCMContract):
    def make_codec(self) -> Codec:
        return open_codec("zstd:1+aesgcm", {"key_file": self.path})


@pytest.fixture
def keys() -> list[str]:
    return [secrets.token_hex(32) for _ in range(3)]


def test_rotation(tmp_path: Path, keys: list[str]) -> None:
    """Written with the first key, read with any."""
    old, new, gone = (codec(key_file(tmp_path, *some)) for some in (keys[:1], keys[1::-1], keys[1:]))
    first, second = encoded_by(old), encoded_by(new)
    assert old.parameters != new.parameters
    assert decoded_by(new, first, old.parameters) == PAYLOAD
    assert decoded_by(new, second, new.parameters) == PAYLOAD
    for reader, encoded, parameters in (
        (old, second, new.parameters),
        (gone, first, old.parameters),
        (codec(None), first, old.parameters),
        (old, second, old.parameters),
    ):
        with pytest.raises(FrameError) as caught:
            decoded_by(reader, encoded, parameters)
        assert caught.value.reason == MissReason.UNDECRYPTABLE


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_hash": b"o" * 32},
        {"shard": 1},
        {"group": 1},
        {"first_token": 16},
        {"num_tokens": 15},
        {"codec": "zstd+aesgcm"},
        {"codec_parameters": "v1+v1,00000000"},
        {"layout": describe_payload(SIZE, "float16").layout},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_entry_in_anothers_place_does_not_decrypt(
    tmp_path: Path, keys: list[str], change: dict[str, object]
) -> None:
    one = codec(key_file(tmp_path, keys[0]))
    encoded = encoded_by(one)
    with pytest.raises(FrameError) as caught:
        decoded_by(one, encoded, one.parameters, msgspec.structs.replace(WHAT, **change))
    assert caught.value.reason == MissReason.UNDECRYPTABLE


def test_any_changed_bit_is_noticed(tmp_path: Path, keys: list[str]) -> None:
    one = codec(key_file(tmp_path, keys[0]))
    encoded = encoded_by(one)
    for position in [*range(40), *range(len(encoded) - 20, len(encoded))]:
        encoded[position] ^= 1
        with pytest.raises(FrameError) as caught:
            decoded_by(one, encoded, one.parameters)
        assert caught.value.reason == MissReason.UNDECRYPTABLE
        encoded[position] ^= 1


def test_the_same_payload_is_never_encrypted_alike(tmp_path: Path, keys: list[str]) -> None:
    one = codec(key_file(tmp_path, keys[0]))
    several = [bytes(encoded_by(one)) for _ in range(5)]
    assert len({each[:12] for each in several}) == 5
    assert len({each[12:] for each in several}) == 5
    assert all(PAYLOAD[:16] not in each for each in several)


def test_entries_have_keys_of_their_own(tmp_path: Path, keys: list[str]) -> None:
    ring = KeyRing(key_file(tmp_path, keys[0]))
    assert ring.derive(ring.writing_id, b"a") == ring.derive(ring.writing_id, b"a")
    assert len({ring.derive(ring.writing_id, identity) for identity in (b"a", b"b", b"")}) == 3


@pytest.mark.parametrize("mode", [0o604, 0o666, 0o660, 0o601])
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path, keys: list[str], mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        codec(key_file(tmp_path, keys[0], mode=mode))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_a_key_file_that_only_its_group_may_read_is_accepted(
    tmp_path: Path, keys: list[str], mode: int
) -> None:
    assert KeyRing(key_file(tmp_path, keys[0], mode=mode)).writing_id


@pytest.mark.parametrize(
    "content", ["", "# nothing\n", "abc\n", "zz" * 32 + "\n", "ab" * 31 + "\n", "\xff\n"]
)
def test_a_key_file_without_proper_keys_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        codec(str(path))
    assert str(path) in str(caught.value)
    assert "zz" not in str(caught.value)
    assert "ab" * 31 not in str(caught.value)


def test_a_key_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    """And not waited for: nobody may ever write to a pipe."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match="not a regular file"):
            codec(str(path))


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        codec(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="encryption_key_file"):
        open_codec("zstd+aesgcm")


def test_keys_are_never_shown(tmp_path: Path, keys: list[str]) -> None:
    path = key_file(tmp_path, *keys)
    one = codec(path)
    ring = KeyRing(path)
    shown = " ".join(map(repr, (one, ring, Decoders({"key_file": path}), AESGCMOptions(key_file=path))))
    assert path in shown
    for key in keys:
        assert key not in shown
        assert key[:8] not in one.parameters
