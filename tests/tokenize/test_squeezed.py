"""Whole images squeezed to squares: what crops of them show, and what training sets hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from fourmill.core.crops import CROPPERS, centre_crop, random_crop
from fourmill.core.names import sample_key
from fourmill.core.shards import ShardPlace, read_members
from fourmill.tokenize.config import TrainSetConfig
from fourmill.tokenize.samples import FOLDERS
from fourmill.tokenize.squeezed import _on_square, crop_squeezed, whole_image
from fourmill.tokenize.train_set import build_train_set, centre_squares, read_label, unpack

BLOCKS = ("block_00", "block_01")
SHAPES = [(120, 90), (90, 120), (100, 100), (128, 32), (1000, 3), (3, 1000), (1, 1)]


@given(st.integers(1, 1200), st.integers(1, 1200), st.integers(1, 512), st.integers(0, 2**32), st.floats(0.05, 1))
def test_a_crop_lies_on_the_square_with_its_own_ratio_and_share(width, height, side_px, seed, low):
    row = random_crop(np.random.default_rng(seed), width, height, (low, 1.0))
    top, left, h, w, _ = _on_square(row, width, height, side_px)
    assert 0 <= top <= top + h <= side_px * (1 + 1e-9) and 0 <= left <= left + w <= side_px * (1 + 1e-9)
    assert (w * width) / (h * height) == pytest.approx(row[3] / row[2])
    assert h * w / side_px**2 == pytest.approx(row[2] * row[3] / (width * height))
    crop_squeezed("semseg", np.zeros((side_px, side_px), np.uint8), row, width, height, 8)


def waves(width: int, height: int, phase: float) -> np.ndarray:
    """A depth map of two waves over the whole, which squeezing loses little of."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return (0.5 + 0.25 * np.sin(5 * x + phase) + 0.25 * np.cos(4 * y - phase)).astype(np.float32)


@given(st.sampled_from(SHAPES), st.integers(0, 2**32), st.sampled_from([0, 1]))
def test_a_crop_of_the_square_shows_what_a_crop_of_the_image_shows(size, seed, hflip):
    width, height = size
    depth = waves(width, height, phase=seed % 7)
    images = {
        "depth": depth,
        "rgb": (depth * 255).round().astype(np.uint8)[..., None].repeat(3, -1),
        "normal": np.stack([np.sin(depth), np.cos(depth), np.zeros_like(depth)], -1),
        "semseg": (depth * 40).astype(np.uint8),
    }
    bounds = {"depth": 0.03, "rgb": 0.03 * 255, "normal": 0.03, "semseg": 3}  # of neighbouring pixels
    drawn = random_crop(np.random.default_rng(seed), width, height, (0.2, 1.0))[:4]
    for label, image in images.items():
        square = CROPPERS[label](image, whole_image(width, height), 128)
        for row in ((*drawn, hflip), centre_crop(width, height)):
            found = crop_squeezed(label, square, row, width, height, 32).astype(np.float32)
            straight = CROPPERS[label](image, row, 32).astype(np.float32)
            assert found.shape == straight.shape and np.abs(found - straight).max() <= bounds[label]


def test_where_nothing_is_squeezed_crops_are_those_of_the_image():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 133, (72, 72, 3), dtype=np.uint8)
    for seed in range(20):
        row = random_crop(np.random.default_rng(seed), 72, 72, (0.2, 1.0))
        assert np.array_equal(crop_squeezed("rgb", image, row, 72, 72, 40), CROPPERS["rgb"](image, row, 40))
    assert np.array_equal(crop_squeezed("rgb", image, centre_crop(72, 72), 72, 72, 72), image)


@pytest.mark.parametrize("label", ["rgb", "depth", "normal", "semseg"])
def test_training_rows_are_whole_images_with_their_sizes_and_held_out_ones_centre_squares(
    store, tiny, chain, put_images, label
):
    put_images(0, SHAPES)
    config = TrainSetConfig(num_samples=30, num_eval=6, blocks=BLOCKS, side_px=96)
    made = build_train_set(store, tiny.dataset, tiny.layout, config, 64)
    arrays = load(store.read(made.path))
    plain = load(store.read(tiny.train_set.path))
    assert arrays["train/size"].dtype == np.int64 and "train/size" not in plain and "eval/size" not in arrays
    assert arrays["train/size"][: len(SHAPES)].tolist() == [[h, w] for w, h in SHAPES]
    assert arrays["train/size"][-1].tolist() == [72, 80]
    assert np.array_equal(arrays[f"eval/{label}"], plain[f"eval/{label}"])
    kept = dict(read_members(store, ShardPlace(tiny.dataset, "train", FOLDERS[label], 0)))
    for square, key in list(zip(unpack(arrays[f"train/{label}"], label), arrays["train/keys"], strict=True))[:9]:
        image = chain.decode(label, kept[sample_key(int(key))])
        squeezed = CROPPERS[label](image, whole_image(image.shape[1], image.shape[0]), 96)
        assert np.allclose(square, squeezed, atol=1 / 127)  # as it is packed, in 8 or 16 bits


@pytest.mark.parametrize("label", ["rgb", "depth", "normal", "semseg"])
def test_centre_squares_of_whole_images_are_those_that_are_packed_without(store, tiny, label):
    config = TrainSetConfig(num_samples=30, num_eval=6, blocks=BLOCKS, side_px=160)
    made = build_train_set(store, tiny.dataset, tiny.layout, config, 64)
    whole = read_label(store, made.path, made.digest, label)
    plain = read_label(store, tiny.train_set.path, tiny.train_set.digest, label)
    found, wanted = (
        np.concatenate([*centre_squares(labels, label, 64)]).astype(np.float32) for labels in (whole, plain)
    )
    assert np.array_equal(wanted, unpack(np.array(plain.train), label))
    scale = {"rgb": 255, "depth": 1, "normal": 2, "semseg": 1}[label]
    off = np.abs(found - wanted) / scale > 0.05
    assert off.mean() < 0.06  # at the edges between two colours alone
    few = np.concatenate([*centre_squares(whole, label, 64, most=4)])
    assert np.array_equal(few, found[::8])
