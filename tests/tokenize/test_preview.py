"""Pictures of held-out labels above their reconstructions."""

import io

import numpy as np
from PIL import Image

from fourmill.tokenize.preview import preview_png


def rows_of(png: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Both rows of the sheet, without titles: 128 pixels each, 6 below each."""
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)[:, -268:]
    return sheet[-268:-140], sheet[-134:-6]


def test_features_above_look_the_same_whatever_is_below() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(2, 8, 8, 16))
    other = 30 + 10 * rng.normal(size=true.shape)
    above, below = rows_of(preview_png("clip", true, true))
    assert np.array_equal(above, below) and above.std() > 10
    assert np.array_equal(rows_of(preview_png("clip", true, other))[0], above)
