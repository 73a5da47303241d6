"""A few samples out of many shards, for people to look at."""

from collections.abc import Sequence


def spread_over(counts: Sequence[int], num: int) -> list[int]:
    """How many samples to take of each shard, so that `num` of them come from all over.

    Args:
        counts: samples of each shard.
        num: samples wanted in all.

    Returns:
        A number a shard, up to its count: at most `num` shards, evenly spaced among those that have any, with equal parts as far
        as they go.
    """
    filled = [shard for shard, count in enumerate(counts) if count]
    num_shards = min(num, len(filled))
    chosen = [filled[i * len(filled) // num_shards] for i in range(num_shards)]
    shares = [0] * len(counts)
    left = min(num, sum(counts[shard] for shard in chosen))
    while left:
        for shard in chosen:
            if left and shares[shard] < counts[shard]:
                shares[shard] += 1
                left -= 1
    return shares
