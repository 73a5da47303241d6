"""Which samples a step sees: a function of (seed, step), so that a resumed training sees what it would have seen."""

import numpy as np
from numpy.typing import NDArray


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """Samples of one step: consecutive parts of a fresh shuffle each epoch; a batch may span two epochs.

    Raises:
        ValueError: no sample.
    """
    if num_samples < 1:
        raise ValueError("a training set without samples has no batches")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num_samples
    shuffles = {int(e): np.random.default_rng([seed, int(e)]).permutation(num_samples) for e in np.unique(epochs)}
    return np.array([shuffles[int(e)][p] for e, p in zip(epochs, positions % num_samples, strict=True)], np.int64)


def batch_flips(batch_size: int, seed: int, step: int) -> NDArray[np.bool_]:
    """Which items of a step's batch are mirrored: half of them."""
    return np.random.default_rng([seed, step, 1]).random(batch_size) < 0.5
