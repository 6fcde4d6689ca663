"""What earlier versions wrote is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from golden_frames import DTYPES, GOLDEN, KEY_FILE, decode, payload_of

from kvstrata import plugins
from kvstrata.codecs.open import Decoders
from kvstrata.frame import FrameHeader

FRAMES = sorted(GOLDEN.glob("*/*.frame"))


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    copy = tmp_path_factory.mktemp("golden") / "keys"
    shutil.copyfile(KEY_FILE, copy)
    copy.chmod(0o600)  # a checkout leaves it readable for all
    return Decoders({"key_file": str(copy)})


@pytest.mark.parametrize("path", FRAMES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_frame_is_read(path: Path, decoders: Decoders) -> None:
    codec, name = path.stem.split(".")
    frame = path.read_bytes()
    assert FrameHeader.unpack(frame).codec == codec
    lossy = path.with_suffix(".decoded")
    expected = lossy.read_bytes() if lossy.exists() else payload_of(name)
    assert decode(frame, name, decoders) == expected


def test_every_codec_has_frames() -> None:
    assert {path.stem.split(".")[0] for path in FRAMES} >= set(plugins.names("codecs"))
    assert {path.stem.split(".")[1] for path in FRAMES} == set(DTYPES)
