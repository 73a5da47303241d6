"""Samples to look at come from all over a block."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.core.spread import spread_over


@pytest.mark.parametrize(
    ("counts", "num", "shares"),
    [
        ([], 4, []),
        ([0, 0], 4, [0, 0]),
        ([9, 0, 9], 4, [2, 0, 2]),
        ([1, 9], 4, [1, 3]),
        ([9] * 7, 4, [1, 1, 0, 1, 0, 1, 0]),  # not the first four
        ([1, 1], 4, [1, 1]),
    ],
)
def test_shares_of_small_blocks(counts: list[int], num: int, shares: list[int]) -> None:
    assert spread_over(counts, num) == shares


@given(st.lists(st.integers(0, 50), max_size=300), st.integers(1, 40))
def test_there_are_as_many_as_can_be_from_shards_far_apart(counts: list[int], num: int) -> None:
    shares = spread_over(counts, num)
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))
    filled = [shard for shard, count in enumerate(counts) if count]
    taken = [place for place, shard in enumerate(filled) if shares[shard]]
    assert len(taken) == min(num, len(filled))
    assert sum(shares) == min(num, sum(counts[filled[place]] for place in taken))
    gaps = [b - a for a, b in pairwise([*taken, len(filled)])]
    assert not gaps or max(gaps) - min(gaps) <= 1
