"""Which samples a step of a training sees: a function of (seed, step), so that a resumed training sees what it would have seen."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=2)  # of twelve million samples: a fifth of a second, at every step otherwise
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch: every sample once. Read only, since it is kept."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    order.flags.writeable = False
    return order


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """Samples of one step: consecutive parts of a fresh order each epoch; a batch may span epochs.

    Raises:
        ValueError: no sample.
    """
    if num_samples < 1:
        raise ValueError("a training set without samples has no batches")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_samples
    orders = {int(epoch): epoch_order(num_samples, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[int(e)][p] for e, p in zip(epochs, positions % num_samples, strict=True)], np.int64)
