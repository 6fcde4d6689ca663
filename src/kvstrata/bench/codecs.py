"""Which codecs a benchmark compares."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvstrata import plugins
from kvstrata.codecs.base import Codec
from kvstrata.codecs.open import open_codec
from kvstrata.errors import KVStrataError

LEVELS = ("cachegen:high", "cachegen:low")


def chosen(
    spellings: Sequence[str], more: Sequence[str], general: Mapping[str, str], notes: list[str]
) -> dict[str, Codec]:
    """Codecs by spelling: those asked for, or all that are installed and ``more``. What is left out is noted.

    Raises:
        ConfigError, PluginError: one that was asked for cannot be had.
    """
    if spellings:
        return {spelling: open_codec(spelling, general) for spelling in spellings}
    codecs: dict[str, Codec] = {}
    for spelling in (*plugins.names("codecs"), *more):
        try:
            codecs[spelling] = open_codec(spelling, general)
        except KVStrataError as error:
            notes.append(f"{spelling} is left out: {error}")
    return codecs


@contextlib.contextmanager
def key_file() -> Iterator[Path]:
    """A file with a key for those that encrypt."""
    with tempfile.TemporaryDirectory(prefix="kvstrata-bench-") as directory:
        path = Path(directory) / "keys"
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        yield path
