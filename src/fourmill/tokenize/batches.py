"""Which samples a step sees, and how: a function of (seed, draw), so that a resumed training sees what it would have seen."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fourmill.core.crops import CropRow, centre_crop, random_crop
from fourmill.core.order import batch_indices
from fourmill.core.ranks import ALONE, Ranks
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.conversions import mirror, to_network
from fourmill.tokenize.squeezed import crop_squeezed
from fourmill.tokenize.train_set import LabelArrays, TrainSetError, unpack


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
        return self.on_device(self.stored(draw))

    def on_device(self, batch: NDArray[Any]) -> Tensor:
        """What `stored` gives, as the network sees it."""
        return to_network(batch, self._config.label, self._device)

    def stored(self, draw: int) -> NDArray[Any]:
        """A draw as tokenizers take it, in the host's memory; any thread may ask."""
        config, training = self._config, self._config.training
        indices = batch_indices(len(self.labels.train), training.batch_size, training.seed, draw)[self._rows]
        side_px = batch_side(training.sides_px, training.seed, draw) if training.sides_px else config.input_px
        batch = unpack(self._packed(side_px)[indices], config.label)
        if config.label != "clip":
            batch = self._cropped(batch, self.labels.sizes[indices], draw, side_px)
        if training.hflip:
            flips = batch_flips(training.batch_size, training.seed, draw)
            batch = mirror(batch, flips[self._rows], config.label)
        return batch

    def _packed(self, side_px: int) -> NDArray[Any]:
        """All samples as they are packed: CLIP features of images of just this side, since they cannot be resized, and squares that
        are cropped and resized, whatever their side.

        Raises:
            TrainSetError: there are no features of this side.
        """
        labels, config = self.labels, self._config
        if config.label != "clip":
            return labels.train
        found = labels.at_side.get(side_px) if labels.at_side else labels.train
        grid = side_px // config.patch_px
        if found is None or found.shape[1:3] != (grid, grid):
            there = ", ".join(map(str, labels.at_side)) or labels.train.shape[1] * config.patch_px
            raise TrainSetError(
                f"the training set has CLIP features of images of {there} pixels, and stage {config.training.name} wants {side_px}: "
                "put that into the set's clip_px and materialize it again"
            )
        return found

    def _cropped(self, batch: NDArray[Any], sizes: NDArray[np.int64], draw: int, side_px: int) -> NDArray[Any]:
        """A crop of each image: drawn on the image's own height and width, cut out of the square that it was squeezed to."""
        label, images = self._config.label, zip(batch, self._rows, sizes.tolist(), strict=True)
        return np.stack(
            [
                crop_squeezed(label, square, self._crop_row(draw, row, width, height), width, height, side_px)
                for square, row, (height, width) in images
            ]
        )

    def _crop_row(self, draw: int, row: int, width: int, height: int) -> CropRow:
        training = self._config.training
        if training.crop_scale is None:
            return centre_crop(width, height)
        generator = np.random.default_rng([training.seed, draw, 2, row])
        return random_crop(generator, width, height, training.crop_scale, training.crop_ratio)


class Ahead:
    """The batches of a training, made while earlier ones are trained on."""

    def __init__(self, batches: Batches, num: int) -> None:
        """A maker of batches.

        Args:
            num: batches that are made at a time, each in a thread.
        """
        self._batches, self._num = batches, num
        self._threads = ThreadPoolExecutor(num, "batches")
        self._made: dict[int, Future[NDArray[Any]]] = {}

    def take(self, draw: int, left: int) -> Tensor:
        """Network input of a draw, on this process's device.

        Args:
            left: draws that follow, as far as is known.
        """
        wanted = range(draw, draw + 1 + min(left, self._num))
        self._made = {one: future for one, future in self._made.items() if one in wanted}  # after a way back others are
        for one in wanted:
            if one not in self._made:
                self._made[one] = self._threads.submit(self._batches.stored, one)
        return self._batches.on_device(self._made.pop(draw).result())

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


def batch_flips(batch_size: int, seed: int, step: int) -> NDArray[np.bool_]:
    """Which items of a step's batch are mirrored: half of them."""
    return np.random.default_rng([seed, step, 1]).random(batch_size) < 0.5


def batch_side(sides_px: tuple[int, ...], seed: int, step: int) -> int:
    """Side of a step's batch, one of those given: the same for every process."""
    return int(np.random.default_rng([seed, step, 3]).choice(sides_px))
