"""Walking over the keys of an ordered dict that changes meanwhile."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Any

_FIRST_BATCH = 8


def unoffered(order: OrderedDict[bytes, Any], offered: Container[bytes]) -> Iterator[bytes]:
    """The keys of ``order`` from the front, without those in ``offered``.

    While the iterator is suspended keys may be added, removed and moved, and ``offered`` may grow. The caller
    puts each key that it gets into ``offered``, or removes it, or moves it to the end (not for ever).

    A dict that changes cannot be iterated over, so keys are taken in batches. As these double, passing over
    those that were offered and kept their place costs no more in all than walking over everything twice.
    """
    batch = _FIRST_BATCH
    while taken := list(itertools.islice((key for key in order if key not in offered), batch)):
        for key in taken:
            if key in order and key not in offered:
                yield key
        batch *= 2
