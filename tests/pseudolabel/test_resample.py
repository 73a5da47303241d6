"""Resizing on a device is Pillow's, to the last bit; to one level where both sides shrink."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fourmill.pseudolabel.resample import resized, resized_on_device

SIDES = st.integers(1, 70)
CPU = torch.device("cpu")


def by_pillow(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))


@given(seed=st.integers(0, 999), old=st.tuples(SIDES, SIDES), new=st.tuples(SIDES, SIDES))
@settings(max_examples=60)
def test_any_size_to_any_other_is_pillows(seed: int, old: tuple[int, int], new: tuple[int, int]) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (*old, 3), dtype=np.uint8)
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)
    expected = by_pillow(rgb, *new)
    off = np.abs(resized_on_device(pixels, *new).permute(1, 2, 0).numpy() - expected)
    assert off.max() <= (1 if new[0] < old[0] and new[1] < old[1] else 0)
    assert np.array_equal(resized(rgb, *new, CPU).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("old", "new"), [((480, 640), (800, 1067)), ((384, 512), (768, 1024)), ((900, 300), (800, 416))]
)
def test_photographs_sizes_are_too(old: tuple[int, int], new: tuple[int, int]) -> None:
    rgb = np.random.default_rng(0).integers(0, 2, (*old, 3), dtype=np.uint8) * 255  # the hardest to round
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)
    assert np.array_equal(resized_on_device(pixels, *new).permute(1, 2, 0).numpy(), by_pillow(rgb, *new))
