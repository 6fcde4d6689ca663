"""Look-ups in tiers where each key costs a request: whole chunks first, then the tails where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def contains_in_steps(
    contains: Callable[[Sequence[str]], list[bool]], keys: Sequence[str], chunk_ends: Sequence[range]
) -> list[bool]:
    """Which of ``keys`` are held, as far as it matters to the tier that is asked, in two calls of ``contains``.

    Args:
        contains: asks the tier.
        keys: of all candidates, block by block.
        chunk_ends: where in ``keys`` each whole chunk has its shards.

    A key that was not asked for counts as not held: tails of chunks that are held as a whole, and tails behind the
    first chunk that is not. The latter would only matter where another tier has that chunk, and this one a tail.
    """
    held = [False] * len(keys)

    def ask(positions: Sequence[int]) -> None:
        if positions:
            for at, answer in zip(positions, contains([keys[at] for at in positions]), strict=True):
                held[at] = answer

    ask([at for end in chunk_ends for at in end])
    num_whole = next(
        (number for number, end in enumerate(chunk_ends) if not all(held[at] for at in end)), len(chunk_ends)
    )
    start = chunk_ends[num_whole - 1].stop if num_whole else 0
    stop = chunk_ends[num_whole].start if num_whole < len(chunk_ends) else len(keys)
    ask(range(start, stop))
    return held
