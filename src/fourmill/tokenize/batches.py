"""Which samples a step sees, and how: a function of (seed, draw), so that a resumed training sees what it would have seen."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fourmill.core.ranks import ALONE, Ranks
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.conversions import mirror, to_network
from fourmill.tokenize.train_set import LabelArrays, unpack


class Batches:
    """The batches of one training, or one process's rows of them."""

    def __init__(self, labels: LabelArrays, config: ImageTokenizerConfig, ranks: Ranks = ALONE) -> None:
        """Batches of a packed label.

        Raises:
            ValueError: the batch cannot be shared evenly by the processes.
        """
        self.labels = labels
        self._config, self._device = config, ranks.device
        self._rows = np.array(ranks.rows(config.training.batch_size))

    def __call__(self, draw: int) -> Tensor:
        """Network input of a draw, on this process's device."""
        config, training = self._config, self._config.training
        indices = batch_indices(len(self.labels.train), training.batch_size, training.seed, draw)
        batch = unpack(self.labels.train[indices[self._rows]], config.label)
        if training.hflip:
            flips = batch_flips(training.batch_size, training.seed, draw)
            batch = mirror(batch, flips[self._rows], config.label)
        return to_network(batch, config.label).to(self._device)


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
