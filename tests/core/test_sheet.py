"""Sheets of pictures as files."""

import io

import numpy as np
from PIL import Image

from fourmill.core.sheet import grid_jpeg


def test_a_jpeg_of_noise_is_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    made = grid_jpeg([[noise] * 4] * 4, [""] * 4, cell_px=256)
    with Image.open(io.BytesIO(made)) as opened:
        opened.load()
        assert opened.width >= 4 * 256
