"""Natural text: as long as asked for, the same every time."""

from __future__ import annotations

import pytest

from kvstrata.testing.text import natural_text


@pytest.mark.parametrize("length", [0, 1, 5000, 600_000])
def test_length(length):
    assert len(natural_text(length)) == length


def test_it_is_the_same_every_time_and_a_longer_one_begins_with_a_shorter_one():
    assert natural_text(9000) == natural_text(9000)
    assert natural_text(9000).startswith(natural_text(4000))


def test_another_start_shares_no_prefix():
    first, second = natural_text(2000), natural_text(2000, start=7)
    assert first[:20] != second[:20]
