"""Sheets of pictures as files."""

import io

import numpy as np
import pytest
from PIL import Image

from fourmill.core.sheet import grid_jpeg


def test_a_jpeg_of_noise_is_whole() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    made = grid_jpeg([[noise] * 4] * 4, [""] * 4, cell_px=256)
    with Image.open(io.BytesIO(made)) as opened:
        opened.load()
        assert opened.width >= 4 * 256


def test_captions_are_of_the_pictures() -> None:
    white = np.full((8, 8, 3), 255, np.uint8)
    bare, said = (grid_jpeg([[white, white]], ["", ""], captions=captions) for captions in (None, [["", "here"]]))
    with Image.open(io.BytesIO(bare)) as without, Image.open(io.BytesIO(said)) as captioned:
        assert captioned.width == without.width and captioned.height > without.height
        dark_HW = np.asarray(captioned.convert("L")) < 128
    half = dark_HW.shape[1] // 2
    assert dark_HW[:, half:].any() and not dark_HW[:, :half].any()
    with pytest.raises(ValueError, match="captions of 1 pictures for 2 pictures"):
        grid_jpeg([[white, white]], ["", ""], captions=[["here"]])
