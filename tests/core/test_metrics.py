import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.core.metrics import (
    USAGE_WINDOW,
    codebook_use,
    depth_error,
    mean_map,
    most_common_map,
    normal_error_degrees,
    standardise_depth,
)

rng = np.random.default_rng(1)


@given(st.floats(0.1, 5), st.floats(-3, 3))
def test_depth_error_does_not_see_scale_and_shift(scale, shift):
    depth = rng.random((2, 10, 10)).astype(np.float32)
    assert depth_error(depth * scale + shift, depth) < 1e-2
    assert depth_error(rng.random((2, 10, 10)), depth) > 0.5


def test_depth_is_standardised_without_the_outer_tenths():
    depth = np.arange(100, dtype=np.float64).reshape(1, 10, 10)
    core = np.arange(10, 90)
    expected = (depth - core.mean()) / np.sqrt(core.var(ddof=1) + 1e-6)
    assert np.allclose(standardise_depth(depth), expected, atol=1e-5)
    outlier = depth.copy()
    outlier[0, 9, 9] = 1e6
    assert np.allclose(standardise_depth(outlier)[0, :9], expected[0, :9], atol=1e-5)
    assert np.isfinite(standardise_depth(np.full((1, 4, 4), 0.3))).all()


def test_normal_angles():
    up = np.zeros((1, 2, 2, 3), np.float32)
    up[..., 2] = 1
    side = np.zeros_like(up)
    side[..., 0] = 2  # length does not matter
    assert normal_error_degrees(up, up) == pytest.approx(0, abs=0.1)
    assert normal_error_degrees(side, up) == pytest.approx(90, abs=0.1)
    half_known = up.copy()
    half_known[0, 0] = 0
    assert normal_error_degrees(side, half_known) == pytest.approx(90, abs=0.1)
    with pytest.raises(ValueError, match="undefined"):
        normal_error_degrees(side, np.zeros_like(up))


def test_codebook_use():
    use = codebook_use(np.array([[0, 1], [0, 1]], np.int16), 4)
    assert (use.usage, use.perplexity) == (0.5, pytest.approx(2))
    many = np.concatenate([np.zeros(USAGE_WINDOW, np.int16), np.full(USAGE_WINDOW, 1), np.full(9, 2)])
    assert codebook_use(many, 4).usage == 0.25  # one codeword in each window; the rest fills none
    with pytest.raises(ValueError, match=r"0\.\.3"):
        codebook_use(np.array([4]), 4)


def test_baselines_are_per_pixel():
    ids = np.array([[[1, 2]], [[1, 255]], [[3, 255]]], np.uint8)
    assert most_common_map(ids).tolist() == [[1, 2]]
    assert mean_map(np.array([[[0.0, 1.0]], [[1.0, 1.0]]])).tolist() == [[0.5, 1.0]]
    with pytest.raises(ValueError, match="no valid pixel"):
        most_common_map(np.full((2, 1, 1), 255, np.uint8))


def test_a_depth_error_is_of_the_counted_pixels_of_maps_standardised_as_a_whole():
    true = np.arange(100.0).reshape(1, 10, 10)
    predicted = true.copy()
    predicted[0, 2, 0], predicted[0, 8, 0] = 80, 20  # changed places: mean and deviation stay
    counted = np.zeros((1, 10, 10), bool)
    counted[0, 2, :4] = True
    deviation = np.sqrt(80 * 81 / 12)  # of the 80 numbers from 10 to 89
    assert depth_error(predicted, true, counted) == pytest.approx(60 / deviation / 4)
    assert depth_error(predicted, true) == pytest.approx(2 * 60 / deviation / 100)
    assert depth_error(predicted, true, true < 20) == 0
    with pytest.raises(ValueError, match="no pixel to count"):
        depth_error(predicted, true, true < 0)


def test_an_angle_counts_where_it_is_asked_for_and_the_true_normal_is_known():
    up, right, away, none = (0, 0, 1), (1, 0, 0), (1, 0, -1), (0, 0, 0)
    true = np.array([[[up, up, none, up]]], np.float32)
    predicted = np.array([[[up, right, right, away]]], np.float32)
    asked = np.array([[[True, True, True, False]]])
    assert normal_error_degrees(predicted, true, asked) == pytest.approx(45, abs=0.1)  # of 0 and 90
    assert normal_error_degrees(predicted, true) == pytest.approx(75, abs=0.1)  # of 0, 90 and 135
    with pytest.raises(ValueError, match="undefined"):
        normal_error_degrees(predicted, true, np.array([[[False, False, True, False]]]))
