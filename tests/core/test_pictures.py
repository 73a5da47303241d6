import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fourmill.core.labels import Box
from fourmill.core.pictures import (
    boxes_picture,
    depth_picture,
    features_painter,
    nearest_pixels,
    normal_picture,
    semseg_legend,
    semseg_picture,
)
from fourmill.core.sheet import fit_picture, grid_png, text_picture


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def brightness(picture: np.ndarray) -> np.ndarray:
    return picture.astype(float) @ (0.3, 0.59, 0.11)


def test_near_is_bright_and_far_is_dark_in_any_unit() -> None:
    ramp = np.linspace(0, 1, 50, dtype=np.float32)[None]
    shown = depth_picture(ramp)
    assert (np.diff(brightness(shown)[0]) < 0).all()
    assert np.array_equal(depth_picture(ramp * 80 - 3), shown)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([(), (3,)]))
def test_the_nearest_pixels_are_a_maps_own_in_their_order(
    height: int, width: int, new_height: int, new_width: int, channels: tuple[int, ...]
) -> None:
    places = np.arange(height * width).reshape(height, width)
    shown = nearest_pixels(
        np.broadcast_to(places.reshape(height, width, *[1] * len(channels)), (height, width, *channels)),
        new_height,
        new_width,
    )
    assert shown.shape == (new_height, new_width, *channels)
    rows, columns = np.divmod(shown.reshape(new_height, new_width, -1)[..., 0], width)
    assert (np.diff(rows, axis=0) >= 0).all() and (np.diff(columns, axis=1) >= 0).all()
    if new_height >= height and new_width >= width:
        assert set(np.unique(shown)) == set(range(height * width))  # none is lost
    assert np.array_equal(nearest_pixels(places, height, width), places)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_a_depth_map_without_range_is_still_a_picture(value: float) -> None:
    assert depth_picture(np.full((3, 4), value, np.float32)).shape == (3, 4, 3)


def test_a_normal_towards_the_camera_is_the_usual_blue() -> None:
    assert normal_picture(np.array([[[0, 0, 1]]], np.float32)).tolist() == [[[128, 128, 255]]]


def test_every_class_has_a_colour_and_the_demos_classes_are_far_apart() -> None:
    colours = semseg_picture(np.arange(133, dtype=np.uint8)[None])[0].astype(int)
    assert len({tuple(c) for c in colours}) > 125
    assert semseg_picture(np.array([[255]], np.uint8)).tolist() == [[[0, 0, 0]]]
    demo = colours[[28, 32, 39, 119, 122]]
    apart = np.abs(demo[:, None] - demo[None]).sum(-1) + 1000 * np.eye(5)
    assert apart.min() > 100


def test_the_legend_shows_the_colours_of_the_map() -> None:
    ids = np.array([[119, 119, 122, 32]], np.uint8)
    legend = semseg_legend(ids, 120, 60)
    assert legend.shape == (60, 120, 3)
    shown = {tuple(c) for c in legend.reshape(-1, 3).tolist()}
    assert {tuple(c) for c in semseg_picture(ids).reshape(-1, 3).tolist()} <= shown


def test_boxes_are_drawn_where_they_are() -> None:
    grey = np.full((40, 80, 3), 100, np.uint8)
    shown = boxes_picture(grey, [Box(0.5, 0.5, 1, 1, 0.9, "cat")])
    assert shown.shape == (80, 160, 3)
    changed = (shown != 100).any(-1)
    assert changed[:26].sum() == 0 and changed[42:, :79].sum() == 0
    assert changed[79, 80:].all() and changed[40:, 159].all()


def test_an_image_without_boxes_is_only_enlarged() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    assert np.array_equal(boxes_picture(rgb, [], scale=3), np.repeat(np.repeat(rgb, 3, 0), 3, 1))


def test_equal_features_get_equal_colours_and_unlike_ones_differ() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 16))
    features = np.stack([np.stack([a, b]), np.stack([b, a])])
    shown = features_painter(features)(features).astype(int)
    assert np.array_equal(shown[0, 0], shown[1, 1]) and np.array_equal(shown[0, 1], shown[1, 0])
    assert np.abs(shown[0, 0] - shown[0, 1]).max() > 200


@pytest.mark.parametrize("shape", [(1, 1, 8), (4, 4, 2), (3, 2, 1)])
def test_few_or_constant_features_are_a_picture_too(shape: tuple[int, int, int]) -> None:
    features = np.ones(shape)
    assert features_painter(features)(features).shape == (*shape[:2], 3)


def test_a_map_near_the_truth_gets_its_colours_though_its_own_strongest_directions_are_others() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 8, 8, 6)) * [1.02, 1.01, 1, 0.99, 0.98, 0.97]
    near = truth * [0.97, 0.98, 0.99, 1, 1.01, 1.02]
    paint = features_painter(truth)
    for one, other in zip(truth, near, strict=True):
        assert np.abs(paint(one).astype(int) - paint(other)).max() < 16
        assert np.abs(paint(one).astype(int) - features_painter(other)(other)).max() > 100


def test_features_out_of_the_truths_range_are_as_bright_as_its_edge() -> None:
    truth = np.random.default_rng(0).normal(size=(8, 8, 4))
    shown = features_painter(truth)(1e6 * truth)
    assert set(np.unique(shown)) == {0, 255}


def test_text_stays_inside_its_picture() -> None:
    shown = text_picture("a long caption " * 40, 100, 50)
    assert shown.shape == (50, 100, 3)
    assert (shown < 100).any() and (shown[:, -1] == 255).all() and (shown[-1] == 255).all()


def test_fitting_enlarges_by_whole_pixels_and_reduces_to_the_side() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (8, 6, 3), dtype=np.uint8)
    assert np.array_equal(fit_picture(rgb, 27)[::3, ::3], rgb)
    assert fit_picture(np.zeros((400, 100, 3), np.uint8), 50).shape == (50, 12, 3)


def test_a_grid_holds_each_picture_unchanged() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    sheet = opened(grid_png([[a, None], [None, b]], ["image", "depth"], ["one", "two"], cell_px=32))
    for picture in (a, b):
        big = np.repeat(np.repeat(picture, 2, 0), 2, 1)
        windows = np.lib.stride_tricks.sliding_window_view(sheet, big.shape)[..., 0, :, :, :]
        assert (windows[:, :, 0, 0] == big[0, 0]).all(-1).any()
        places = np.argwhere((windows[:, :, 0, 0] == big[0, 0]).all(-1))
        assert any(np.array_equal(windows[y, x], big) for y, x in places)


def test_a_grid_is_the_same_bytes_each_time_and_a_palette_makes_it_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert grid_png([[noise]], ["x"]) == grid_png([[noise]], ["x"])
    assert len(grid_png([[noise]], ["x"], colours=64)) < len(grid_png([[noise]], ["x"])) / 2


def test_a_grid_refuses_rows_that_have_no_title() -> None:
    cell = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="2 pictures under 1 column"):
        grid_png([[cell, cell]], ["image"])
    with pytest.raises(ValueError, match="1 row titles for 2 rows"):
        grid_png([[cell], [cell]], ["image"], ["one"])
