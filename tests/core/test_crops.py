import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from fourmill.core.crops import (
    CropConfig,
    centre_crop,
    crop_depth,
    crop_normal,
    crop_rgb,
    crop_rows,
    crop_semseg,
    random_crop,
)
from fourmill.core.labels import pack_normal, unpack_normal
from fourmill.core.names import sample_key

rng = np.random.default_rng(0)


def test_the_centre_crop_of_401_by_300():
    assert centre_crop(401, 300) == (0, 50, 300, 300, 0)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_centre_crops_are_the_largest_square_in_the_middle(width, height):
    top, left, h, w, hflip = centre_crop(width, height)
    assert h == w == min(width, height) and hflip == 0
    assert top + h <= height and left + w <= width
    assert abs((height - h - top) - top) <= 1 and abs((width - w - left) - left) <= 1


def test_an_image_without_pixels_has_no_crop():
    with pytest.raises(ValueError, match="no crop"):
        centre_crop(0, 5)


def test_a_crop_of_the_right_size_is_the_pixels_themselves():
    rgb = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(crop_rgb(rgb, (2, 5, 16, 16, 0), 16), rgb[2:18, 5:21])
    assert np.array_equal(crop_rgb(rgb, (2, 5, 16, 16, 1), 16), rgb[2:18, 5:21][:, ::-1])
    assert np.array_equal(crop_semseg(rgb[..., 0], (2, 5, 16, 16, 0), 16), rgb[2:18, 5:21, 0])


def test_resizing_keeps_each_kind_a_label_of_its_kind():
    row = centre_crop(30, 24)
    assert crop_rgb(np.full((24, 30, 3), 77, np.uint8), row, 8).tolist() == np.full((8, 8, 3), 77).tolist()
    depth = np.tile(np.linspace(0, 1, 30, dtype=np.float32), (24, 1))
    small = crop_depth(depth, row, 8)
    assert small.shape == (8, 8) and small.dtype == np.float32 and (np.diff(small[0]) > 0).all()
    ids = rng.choice(np.array([0, 28, 132, 255], np.uint8), (24, 30))
    assert set(np.unique(crop_semseg(ids, row, 8))) <= {0, 28, 132, 255}


def test_depth_beside_an_edge_stays_depth():
    depth = np.repeat([[0.0] * 12 + [1.0] * 12], 24, 0).astype(np.float32)
    small = crop_depth(depth, (0, 0, 24, 24, 0), 16)
    assert small.min() == 0 and small.max() == 1
    assert np.abs(small.mean() - 0.5) < 0.01


@pytest.mark.parametrize("size_px", [8, 20, 40])
def test_normals_and_depth_are_resized_as_pictures_are(size_px):
    """PIL's default, which the public code resizes them by before they reach a tokenizer."""
    normal = unpack_normal(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8))
    place = (3, 2, 24, 22)  # left, top, right, bottom
    picture = Image.fromarray(pack_normal(normal)).crop(place).resize((size_px, size_px))
    assert np.array_equal(crop_normal(normal, (2, 3, 20, 21, 0), size_px), unpack_normal(np.asarray(picture)))
    mirrored = crop_normal(normal, (2, 3, 20, 21, 1), size_px)
    wanted = np.asarray(picture)[:, ::-1].copy()
    wanted[..., 0] = 255 - wanted[..., 0]
    assert np.abs(mirrored - unpack_normal(wanted)).max() < 1.01 / 127.5  # one step: PIL rounds after it mirrors
    depth = rng.random((24, 30)).astype(np.float32)
    whole = np.asarray(Image.fromarray(depth).crop(place).resize((size_px, size_px)))
    assert np.array_equal(crop_depth(depth, (2, 3, 20, 21, 0), size_px), np.clip(whole, 0, 1))


def test_normals_that_are_not_resized_are_as_they_were_and_mirroring_turns_their_x():
    normal = rng.normal(size=(24, 30, 3)).astype(np.float32)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    flipped = crop_normal(normal, (0, 0, 24, 24, 1), 24)
    assert np.allclose(flipped[:, ::-1] * [-1, 1, 1], normal[:, :24])
    short = crop_normal(normal / 2, (0, 0, 24, 24, 0), 24)
    assert np.array_equal(short, normal[:, :24] / 2)


@given(st.integers(0, 2**32), st.sampled_from([0, 1]))
def test_edges_between_pixels_cut_them(seed, hflip):
    rng = np.random.default_rng(seed)
    depth = np.broadcast_to((np.arange(30) + 0.5) / 30, (24, 30)).astype(np.float32)
    left, width = rng.uniform(0, 10), rng.uniform(8, 20)
    got = crop_depth(depth, (rng.uniform(0, 4), left, 19.5, width, hflip), 8)[:, :: -1 if hflip else 1]
    wanted = (left + (np.arange(8) + 0.5) / 8 * width) / 30
    assert np.abs(got - wanted)[:, 1:-1].max() < 0.1 / 30  # a tenth of a pixel; the outer ones lack a neighbour
    ids = (np.arange(24)[:, None] + np.zeros(30)).astype(np.uint8)
    assert set(np.unique(crop_semseg(ids, (2.5, 0.5, 3.0, 29.5, hflip), 8))) <= {2, 3, 4, 5}


@pytest.mark.parametrize(
    "row", [(0, 0, 25, 10, 0), (-1, 0, 10, 10, 0), (0, 25, 10, 10, 0), (0, 0, 0, 10, 0), (0, 0, 9, 9, 2)]
)
def test_a_crop_outside_the_image_is_refused_with_both_sizes(row):
    with pytest.raises(ValueError, match="30 x 24 pixels"):
        crop_rgb(np.zeros((24, 30, 3), np.uint8), row, 8)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 999), st.integers(1, 6), st.integers(0, 3))
def test_crops_are_inside_of_the_configs_ranges_and_the_first_is_the_centre(width, height, row, num, seed):
    config = CropConfig(num=num, seed=seed, scale=(0.5, 0.9), ratio=(0.75, 1.5))
    rows = crop_rows(sample_key(row), width, height, config)
    assert rows == crop_rows(sample_key(row), width, height, config)
    assert len(rows) == num and rows[0] == centre_crop(width, height)
    for top, left, crop_height, crop_width, hflip in rows[1:]:
        assert 0 <= top and 0 <= left and top + crop_height <= height and left + crop_width <= width and hflip in (0, 1)
        in_range = 0.75 <= width / height <= 1.5  # else it may be that none of ten draws fits
        if in_range and min(width, height) > 50:
            assert 0.45 <= crop_height * crop_width / (width * height) <= 0.95
            assert 0.7 <= crop_width / crop_height <= 1.6


@pytest.mark.parametrize(("width", "height"), [(1000, 3), (3, 1000), (1, 1), (640, 200), (201, 640)])
def test_where_no_draw_fits_the_crop_is_torchvisions(width, height):
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.99, 1.0], [0.75, 4 / 3])
    assert random_crop(np.random.default_rng(0), width, height, (0.99, 1.0)) == (*theirs, 0)


def test_further_crops_keep_what_was_drawn_before_and_differ_by_key_and_seed():
    three, five = (crop_rows(sample_key(7), 320, 240, CropConfig(num=num, scale=(0.2, 0.5))) for num in (3, 5))
    assert five[:3] == three and len(set(five)) == 5
    assert five != crop_rows(sample_key(8), 320, 240, CropConfig(num=5, scale=(0.2, 0.5)))
    assert five != crop_rows(sample_key(7), 320, 240, CropConfig(num=5, seed=1, scale=(0.2, 0.5)))
    flips = [row[4] for k in range(200) for row in crop_rows(sample_key(k), 320, 240, CropConfig(num=2))[1:]]
    assert 60 < sum(flips) < 140
    assert not any(r[4] for k in range(50) for r in crop_rows(sample_key(k), 320, 240, CropConfig(num=3, hflip=0)))


@pytest.mark.parametrize(
    "wrong", [{"scale": (0, 1)}, {"scale": (0.9, 0.5)}, {"scale": (0.5, 1.1)}, {"ratio": (2, 1)}, {"num": 0}]
)
def test_crops_that_cannot_be_drawn_are_refused(wrong):
    with pytest.raises(ValueError, match=r"scale|num"):
        CropConfig.model_validate(wrong)
