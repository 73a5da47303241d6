from typing import Any

import numpy as np
import pytest
import torch

from fourmill.tokenize.score import (
    baseline_map,
    class_ious,
    feature_cosine,
    feature_r2,
    figures,
    psnr_db,
    score_model,
    ssim,
)
from fourmill.tokenize.train_set import LabelArrays

rng = np.random.default_rng(1)


def test_iou_counts_present_classes_and_leaves_invalid_pixels_out():
    true = np.array([[[0, 0, 1, 255]]], np.uint8)
    predicted = np.array([[[0, 1, 1, 5]]], np.uint8)
    assert class_ious(predicted, true) == {0: 0.5, 1: 0.5}
    assert class_ious(np.full_like(true, 255), true) == {0: 0, 1: 0}
    assert figures("semseg", true, true, true)["miou"] == 1
    with pytest.raises(ValueError, match="no valid pixel"):
        class_ious(predicted, np.full_like(true, 255))


@pytest.mark.parametrize(("what", "predicted", "true"), [("prediction", 200, 0), ("truth", 0, 200)])
def test_ids_that_are_no_classes_are_refused_and_never_counted_as_others(what, predicted, true):
    maps = (np.full((1, 2, 2), class_id, np.uint8) for class_id in (predicted, true))
    with pytest.raises(ValueError, match=rf"the {what} holds class 200, expected uint8 in 0\.\.132, or 255 for none"):
        class_ious(*maps)


def test_maps_of_other_shapes_or_types_are_refused():
    maps: Any = np.zeros((2, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="must be equal"):
        class_ious(maps, maps[:1])
    with pytest.raises(ValueError, match="classes as int64, expected uint8"):
        class_ious(maps.astype(np.int64), maps)


def test_images_that_are_not_of_8_bits_or_too_small_are_refused():
    image: Any = np.zeros((1, 16, 16, 3), np.uint8)
    for figure in (psnr_db, ssim):
        with pytest.raises(ValueError, match="images are float32 and uint8, expected uint8 of both"):
            figure(image.astype(np.float32), image)
    with pytest.raises(ValueError, match="images of 16 x 8 pixels, expected 11 a side or more for SSIM"):
        ssim(image[:, :8], image[:, :8])


def test_as_many_maps_as_a_training_holds_out_are_counted_in_its_deterministic_mode():
    """The counting of torchmetrics would ask for 590 GB here."""
    true = rng.integers(0, 133, (500, 128, 128), dtype=np.uint8)
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        assert set(class_ious(true, true).values()) == {1.0}
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode(mode)


def test_psnr_is_each_images_own_and_100_where_nothing_differs():
    image = np.full((1, 4, 4, 3), 100, np.uint8)
    apart = 20 * np.log10(255 / 10)
    assert psnr_db(image + 10, image) == pytest.approx(apart)
    assert psnr_db(image, image) == 100
    both = np.concatenate([image, image + 10])
    assert psnr_db(both, np.repeat(image, 2, 0)) == pytest.approx((100 + apart) / 2)
    with pytest.raises(ValueError, match="must be equal"):
        psnr_db(image, both)


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    images = rng.integers(60, 200, (70, 16, 16, 3), dtype=np.uint8)
    noise = rng.integers(-50, 50, images.shape)
    little, much = ((images + noise // share).clip(0, 255).astype(np.uint8) for share in (5, 1))
    assert ssim(images, images) == pytest.approx(1)
    assert 1 > ssim(little, images) > ssim(much, images) > 0
    assert ssim(much, images) == pytest.approx(np.mean([ssim(much[i : i + 1], images[i : i + 1]) for i in range(70)]))


def test_features_are_compared_by_direction_and_by_variance():
    features = rng.normal(size=(5, 2, 2, 8))
    assert feature_cosine(features * 3, features) == pytest.approx(1)
    assert feature_r2(features, features) == pytest.approx(1)
    assert feature_r2(np.broadcast_to(features.mean((0, 1, 2)), features.shape), features) == pytest.approx(0)
    half = 0.5 * (features + features.mean((0, 1, 2)))
    assert feature_r2(half, features) == pytest.approx(0.75)


def test_a_baseline_leaves_out_what_is_no_number():
    train = np.array([[[[1.0]]], [[[np.inf]]], [[[3.0]]]], np.float32)
    assert baseline_map("clip", train).tolist() == [[[2.0]]]


def test_normals_are_also_scored_on_things_alone():
    true = np.zeros((1, 16, 16, 3), np.float32)
    true[..., 2] = 1
    classes, predicted = np.full((1, 16, 16), 100, np.uint8), true.copy()
    classes[0, :4] = 32  # a ball, on a quarter of the image
    predicted[0, :4] = (0, 1, 0)
    found = figures("normal", predicted, true, classes)
    assert (found["degrees"], found["degrees_things"]) == (pytest.approx(22.5), pytest.approx(90))


def test_a_tokenizer_is_scored_on_held_out_samples():
    class Copies:
        def tokenize(self, true: np.ndarray) -> np.ndarray:
            self.seen = true
            return np.zeros((len(true), 4), np.int16)

        def detokenize(self, tokens: np.ndarray) -> np.ndarray:
            return self.seen

    train, held_out = (np.full((2, 16, 16, 3), value, np.uint8) for value in (1, 2))
    scored = score_model(Copies(), LabelArrays(train, held_out, held_out[..., 0], 2), "rgb")  # type: ignore[arg-type]
    assert np.array_equal(scored.true, held_out) and scored.figures["psnr_db"] == 100


def test_a_channel_counts_in_r2_by_its_own_variance() -> None:
    """Squares around their own means are 18 and 2, and the 2 are left; R2 of the channels, 1 and 0, has a mean of 0.5."""
    true = np.array([[13.0, 1], [7, -1]])
    predicted = np.array([[13.0, 0], [7, 0]])
    assert feature_r2(predicted, true) == pytest.approx(0.9)
