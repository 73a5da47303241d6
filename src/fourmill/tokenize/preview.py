"""Held-out labels above their reconstructions, as one small picture."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.pictures import depth_picture, features_picture, grid_png, normal_picture, semseg_picture
from fourmill.tokenize.config import ImageLabel

NUM_SHOWN = 8
_CELL_PX = 128


def preview_png(label: ImageLabel, true: NDArray[Any], predicted: NDArray[Any]) -> bytes:
    """The first samples of each, in columns; features of a pair share their colours."""
    pairs = [_pair(label, t, p) for t, p in zip(true[:NUM_SHOWN], predicted[:NUM_SHOWN], strict=True)]
    rows = [[above for above, _ in pairs], [below for _, below in pairs]]
    titles = [f"held out {i + 1}" for i in range(len(pairs))]
    return grid_png(rows, titles, ["input", "decoded"], cell_px=_CELL_PX)


def _pair(label: ImageLabel, true: NDArray[Any], predicted: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if label == "rgb":
        return true, predicted
    if label == "semseg":
        return semseg_picture(true), semseg_picture(predicted)
    if label == "normal":
        return normal_picture(true), normal_picture(predicted)
    if label == "depth":
        return depth_picture(true), depth_picture(predicted)
    both = features_picture(np.concatenate([true, predicted], axis=1))
    return both[:, : true.shape[1]], both[:, true.shape[1] :]
