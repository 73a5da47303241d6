import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourmill.core.metrics import (
    class_ious,
    codebook_use,
    depth_error,
    feature_cosine,
    feature_r2,
    mean_iou,
    mean_map,
    most_common_map,
    normal_error_degrees,
    plain_l1,
    psnr_db,
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


def test_iou_counts_present_classes_and_leaves_invalid_pixels_out():
    true = np.array([[[0, 0, 1, 255]]], np.uint8)
    predicted = np.array([[[0, 1, 1, 5]]], np.uint8)
    assert class_ious(predicted, true) == {0: 0.5, 1: 0.5}
    assert mean_iou(true, true) == 1
    assert mean_iou(np.full_like(true, 7), true) == 0
    with pytest.raises(ValueError, match="no valid pixel"):
        mean_iou(predicted, np.full_like(true, 255))


def test_psnr_features_and_plain_difference():
    image = np.full((1, 4, 4, 3), 100, np.uint8)
    assert psnr_db(image + 10, image) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr_db(image, image) == pytest.approx(100)
    features = rng.normal(size=(5, 2, 2, 8))
    assert feature_cosine(features * 3, features) == pytest.approx(1)
    assert feature_r2(features, features) == 1
    assert feature_r2(np.broadcast_to(features.mean((0, 1, 2)), features.shape), features) == pytest.approx(0)
    assert plain_l1(np.ones(3), np.zeros(3)) == 1
    with pytest.raises(ValueError, match="must be equal"):
        plain_l1(np.ones(3), np.zeros(4))


def test_codebook_use():
    use = codebook_use(np.array([[0, 1], [0, 1]], np.int16), 4)
    assert (use.usage, use.perplexity, use.num_tokens) == (0.5, pytest.approx(2), 4)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        codebook_use(np.array([4]), 4)


def test_baselines_are_per_pixel():
    ids = np.array([[[1, 2]], [[1, 255]], [[3, 255]]], np.uint8)
    assert most_common_map(ids).tolist() == [[1, 2]]
    assert mean_map(np.array([[[0.0, 1.0]], [[1.0, 1.0]]])).tolist() == [[0.5, 1.0]]
    with pytest.raises(ValueError, match="no valid pixel"):
        most_common_map(np.full((2, 1, 1), 255, np.uint8))
