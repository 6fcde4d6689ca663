"""Prompts of natural text for a real engine."""

from __future__ import annotations

from collections.abc import Callable

from kvstrata.errors import ServerUnavailable
from kvstrata.testing.text import natural_text

_CHARACTERS_PER_TOKEN = 8
_TOPICS_APART = 5


def prompts_apart(tokenize: Callable[[str], list[int]], count: int, num_tokens: int) -> list[list[int]]:
    """``count`` prompts of ``num_tokens`` tokens that share no prefix.

    Raises:
        ServerUnavailable: the tokenizer makes fewer tokens of a text than that.
    """
    prompts = []
    for number in range(count):
        text = natural_text(num_tokens * _CHARACTERS_PER_TOKEN, start=number * _TOPICS_APART)
        tokens = tokenize(text)[:num_tokens]
        if len(tokens) < num_tokens:
            raise ServerUnavailable(f"the model's tokenizer made only {len(tokens)} tokens of a text")
        prompts.append(tokens)
    return prompts
