"""What a look-up asks a tier: whole chunks first, then the tails where they end. A tenth of all candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from kvstrata.cache.walk import Candidates


def contains_in_steps(contains: Callable[[Sequence[str]], list[bool]], candidates: Candidates) -> bytes:
    """Which candidates a tier holds, as far as it matters, in at most two calls of ``contains``.

    A tier that holds all of a prompt, or nothing, is asked once: for the whole chunks, and for the tails before
    the first and behind the last. One that holds a part is asked again, for the tails of its first missing chunk.
    Measured with Redis over a round trip of 5 ms, 128 chunks of 16 blocks: 6.3 ms, or 11.8 ms in two calls, where
    asking for all 2,048 candidates took 9.6 to 17 ms; without the round trip 0.7 or 1.2 ms, and 6.

    A key that is not asked for counts as not held: tails of chunks that are held as a whole, and tails behind the
    first chunk that is not. The latter would only matter where another tier has that chunk, and this one a tail.

    Args:
        contains: asks the tier; answers for each key.

    Returns:
        For each candidate, shard by shard, 1 or 0.
    """
    shards, ends = candidates.num_shards, candidates.chunk_ends()
    held = bytearray(len(candidates) * shards)

    def ask(numbers: Iterable[int]) -> None:
        asked = list(numbers)
        answers = contains(candidates.keys(asked)) if asked else []
        for i, number in enumerate(asked):
            held[number * shards : (number + 1) * shards] = map(bool, answers[i * shards : (i + 1) * shards])

    def is_held(number: int) -> bool:
        return all(held[number * shards : (number + 1) * shards])

    if not ends:
        ask(range(len(candidates)))
        return bytes(held)
    ask(itertools.chain(range(ends[0]), ends, range(ends[-1] + 1, len(candidates))))
    for before, end in itertools.pairwise(ends):
        if not is_held(before):
            break
        if not is_held(end):
            ask(range(before + 1, end))
            break
    return bytes(held)
