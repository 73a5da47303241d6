"""Held-out labels above their reconstructions, as one small picture."""

from typing import Any

from numpy.typing import NDArray

from fourmill.core.pictures import painter_of
from fourmill.core.sheet import grid_png
from fourmill.tokenize.config import ImageLabel

NUM_SHOWN = 8
_CELL_PX = 128


def preview_png(label: ImageLabel, true: NDArray[Any], predicted: NDArray[Any]) -> bytes:
    """The first samples of each, in columns; features in colours of the held-out ones, above and below."""
    shown = true[:NUM_SHOWN]
    paint = painter_of(label, shown)
    rows = [[paint(one) for one in maps] for maps in (shown, predicted[:NUM_SHOWN])]
    titles = [f"held out {i + 1}" for i in range(len(shown))]
    return grid_png(rows, titles, ["input", "decoded"], cell_px=_CELL_PX)
