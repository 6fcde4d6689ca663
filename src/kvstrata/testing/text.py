"""Natural text of any length, without a download and the same on every run.

Greedy answers to random token ids differ even between two runs of the same engine (near ties); answers to
natural text do so rarely. The text is Python's own language reference, as ``help()`` shows it.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
import re

_SPACE = re.compile(r"[ \t]+")


def natural_text(num_characters: int, *, start: int = 0) -> str:
    """``num_characters`` characters of English prose.

    Texts with a different ``start`` (a topic's index) share no prefix. The text repeats from the first topic
    when it has been used up, after some 465,000 characters.
    """
    topics = [topic for _, topic in sorted(pydoc_data.topics.topics.items())]
    start %= len(topics)
    parts: list[str] = []
    length = 0
    for topic in itertools.cycle(topics[start:] + topics[:start]):
        if length >= num_characters:
            break
        part = _SPACE.sub(" ", topic.strip()) + "\n\n"
        parts.append(part)
        length += len(part)
    return "".join(parts)[:num_characters]
