"""The two prompts of the demo."""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.testing.text import natural_text

_CHARACTERS_PER_TOKEN = 8
_PASSAGE_TOKENS = 60
_OTHER_TOPIC = 30


def demo_prompts(tokenize: Callable[[str], list[int]], num_tokens: int) -> tuple[list[int], list[int]]:
    """Two prompts of ``num_tokens`` tokens of natural text that share their first half.

    Each ends with a passage from its first part, twice and begun once more. A small model then goes on with that
    passage, sure of every token, so that its greedy answer does not hang on the last bit of a logprob.
    """
    first = tokenize(natural_text(num_tokens * _CHARACTERS_PER_TOKEN))
    other = tokenize(natural_text(num_tokens * _CHARACTERS_PER_TOKEN, start=_OTHER_TOPIC))
    half = num_tokens // 2
    return (
        _with_echo(first[:num_tokens], num_tokens // 4),
        _with_echo(first[:half] + other[: num_tokens - half], num_tokens // 3),
    )


def _with_echo(tokens: list[int], start: int) -> list[int]:
    """``tokens``, the last ones replaced by copies of those from ``start`` on."""
    passage = tokens[start : start + _PASSAGE_TOKENS]
    echo = (passage * 3)[: 2 * _PASSAGE_TOKENS + _PASSAGE_TOKENS // 3]
    return tokens[: -len(echo)] + echo
