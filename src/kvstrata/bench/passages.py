"""Passages of natural text to judge a codec by: Python's language reference, cut into pieces that share nothing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from kvstrata.errors import ConfigError
from kvstrata.testing.text import natural_text

LENGTHS = (1000, 1000, 1250, 1500, 3000)
"""Tokens of the passages, in turn."""
_ALL_CHARACTERS = 460_000
"""Just less than there are, so that nothing repeats."""


class Passage(msgspec.Struct, frozen=True):
    """A prompt, and how the text goes on."""

    number: int
    prompt: tuple[int, ...]
    rest: tuple[int, ...]


def passages(tokenize: Callable[[str], list[int]], count: int, rest_tokens: int) -> list[Passage]:
    """``count`` passages of 1,000 to 3,000 tokens, the last ``rest_tokens`` of each being the rest.

    Raises:
        ConfigError: there is not so much text.
    """
    tokens = tokenize(natural_text(_ALL_CHARACTERS))
    ends = list(itertools.accumulate(itertools.islice(itertools.cycle(LENGTHS), count), initial=0))
    if ends[-1] > len(tokens):
        raise ConfigError(f"{count} passages take {ends[-1]} tokens, the text has {len(tokens)}")
    pieces = [tuple(tokens[start:end]) for start, end in itertools.pairwise(ends)]
    return [
        Passage(number, piece[:-rest_tokens], piece[-rest_tokens:]) for number, piece in enumerate(pieces)
    ]


def fingerprint(of: Sequence[Passage]) -> str:
    """Of the passages' tokens: equal when two runs read the same text."""
    digest = hashlib.sha256()
    for passage in of:
        digest.update(np.array(passage.prompt + passage.rest, "<u4").tobytes())
    return digest.hexdigest()[:16]
