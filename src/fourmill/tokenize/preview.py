"""Held-out labels above their reconstructions, as one small picture."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourmill.core.pictures import depth_picture, features_painter, grid_png, normal_picture, semseg_picture
from fourmill.tokenize.config import ImageLabel

NUM_SHOWN = 8
_CELL_PX = 128
_PAINTERS: dict[str, Callable[[NDArray[Any]], NDArray[np.uint8]]] = {
    "rgb": lambda rgb: rgb,
    "depth": depth_picture,
    "normal": normal_picture,
    "semseg": semseg_picture,
}


def preview_png(label: ImageLabel, true: NDArray[Any], predicted: NDArray[Any]) -> bytes:
    """The first samples of each, in columns; features in colours of the held-out ones, above and below."""
    shown = true[:NUM_SHOWN]
    paint = _PAINTERS[label] if label in _PAINTERS else features_painter(shown)
    rows = [[paint(one) for one in maps] for maps in (shown, predicted[:NUM_SHOWN])]
    titles = [f"held out {i + 1}" for i in range(len(shown))]
    return grid_png(rows, titles, ["input", "decoded"], cell_px=_CELL_PX)
