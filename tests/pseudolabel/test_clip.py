from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.pseudolabel import clip
from fourmill.pseudolabel.choices import demo_labellers
from fourmill.pseudolabel.config import ClipConfig, SceneConfig
from fourmill.pseudolabel.labeller import NetworkError
from fourmill.pseudolabel.make import make_features, make_labeller

pytestmark = pytest.mark.usefixtures("one_thread")
DEMO = ClipConfig(weights="seeded:0", patch_px=8, channels=64)


@pytest.fixture
def crops(photo: Callable[..., np.ndarray]) -> np.ndarray:
    return np.stack([photo(64, 64, seed) for seed in range(5)])


def test_the_demos_features_are_8_by_8_by_64_and_the_same_each_time(crops: np.ndarray) -> None:
    features = make_features(demo_labellers()["clip"])(crops)
    assert features.shape == (5, 8, 8, 64) and features.dtype == np.float32
    assert np.array_equal(features, make_features(DEMO)(crops))
    assert not np.array_equal(features, make_features(DEMO.model_copy(update={"weights": "seeded:1"}))(crops))


def test_features_tell_places_and_images_apart(crops: np.ndarray) -> None:
    features = make_features(DEMO)(crops)
    assert features.std((1, 2)).mean() > 0.2 * features.std()
    assert features.mean((1, 2)).std(0).mean() > 0.1 * features.std()


def test_a_feature_is_mostly_about_its_own_patch(crops: np.ndarray) -> None:
    changed = crops[:1].copy()
    changed[0, 16:24, 40:48] = 255 - changed[0, 16:24, 40:48]  # the patch at row 2, column 5
    extract = make_features(DEMO)
    moved = np.linalg.norm(extract(changed) - extract(crops[:1]), axis=-1)[0]
    assert np.unravel_index(moved.argmax(), moved.shape) == (2, 5)
    others = np.delete(moved.ravel(), 2 * 8 + 5)
    assert others.max() < 0.3 * moved.max()


def test_batches_change_nothing_to_speak_of_and_no_crops_give_no_features(crops: np.ndarray) -> None:
    one, many = (make_features(DEMO.model_copy(update={"batch_size": size})) for size in (2, 5))
    assert np.abs(one(crops) - many(crops)).max() < 1e-4
    assert one(crops[:0]).shape == (0, 8, 8, 64)


def test_crops_may_be_resized_to_more_patches(crops: np.ndarray) -> None:
    assert make_features(DEMO.model_copy(update={"input_px": 128}))(crops[:1]).shape == (1, 16, 16, 64)


def test_dense_features_begin_as_transformers_own_embeddings_do(crops: np.ndarray) -> None:
    """The CLS token that is dropped is the image embedding of transformers' own forward pass."""
    extract: Any = make_features(DEMO)
    network, pixels = extract._network, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = network(pixels).last_hidden_state
        tokens = network.visual_projection(network.vision_model.post_layernorm(theirs))[:, 1:]
        assert torch.allclose(clip.dense_features(network, pixels).flatten(1, 2), tokens, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "bias"), [(64, 64, False), (16, 48, True)])
def test_patches_by_a_product_are_those_of_the_convolution(height: int, width: int, bias: bool) -> None:
    embed = torch.nn.Conv2d(3, 24, 16, 16, bias=bias).to(memory_format=torch.channels_last)
    pixels = torch.randn(2, 3, height, width).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(clip.by_product(embed, pixels), embed(pixels).flatten(2).mT)


def test_any_multiple_of_the_patch_is_a_size_for_crops(photo: Callable[..., np.ndarray]) -> None:
    extract = make_features(DEMO)
    for side in (8, 24, 40, 72, 128):
        assert extract(photo(side, side)[None]).shape == (1, side // 8, side // 8, 64)


def cubic(values: np.ndarray, place: float) -> float:
    """Cubic convolution with a = -0.75, edges repeated: what torch calls bicubic, along one axis."""
    first, a = int(np.floor(place)), -0.75
    total = 0.0
    for index in range(first - 1, first + 3):
        x = abs(place - index)
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        total += values[min(max(index, 0), len(values) - 1)] * (near if x <= 1 else far)
    return total


def test_positions_are_stretched_by_the_factor_of_the_code_that_made_the_public_tokens() -> None:
    """(28 + 0.1) / 14, not 28 / 14: the last of 28 places lies a twentieth of a patch further to the left."""
    values = np.random.default_rng(0).normal(size=14)
    grid = torch.from_numpy(np.broadcast_to(values[:, None], (14, 14)).copy())
    rows = clip.positions(torch.cat([torch.zeros(1, 1), grid.reshape(-1, 1)]), 28, 28)[1:].reshape(28, 28)[:, 5]
    expected = [cubic(values, (i + 0.5) * 14 / 28.1 - 0.5) for i in range(28)]
    assert np.allclose(rows.numpy(), expected, atol=1e-5)


def test_positions_keep_the_trained_grid_and_stretch_it_for_others() -> None:
    stored = torch.randn(1 + 64, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clip.positions(stored, 8, 8), stored)
    for height, width in ((16, 16), (16, 8), (5, 11), (4, 4)):
        assert clip.positions(stored, height, width).shape == (1 + height * width, 6)
    assert torch.equal(clip.positions(stored, 16, 16)[:1], stored[:1])


def test_a_saved_network_gives_the_same_features(tmp_path: Path, crops: np.ndarray) -> None:
    seeded: Any = make_features(DEMO)
    seeded._network.save_pretrained(tmp_path)
    loaded = make_features(DEMO.model_copy(update={"weights": str(tmp_path)}))
    assert np.array_equal(loaded(crops), seeded(crops))
    with pytest.raises(NetworkError, match="patches of 8 pixels and 64 channels"):
        make_features(ClipConfig(weights=str(tmp_path)))


@pytest.mark.parametrize(
    "crops", [np.zeros((1, 64, 48, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32)]
)
def test_what_is_not_a_batch_of_square_crops_is_refused(crops: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(B, S, S, 3\)"):
        make_features(DEMO)(crops)


def test_a_side_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="8-pixel patches"):
        make_features(DEMO)(np.zeros((1, 60, 60, 3), np.uint8))


def test_features_and_labels_are_not_mixed_up() -> None:
    with pytest.raises(ValueError, match="does not make clip"):
        make_features(SceneConfig())
    with pytest.raises(ValueError, match="make_features"):
        make_labeller("clip", DEMO)


def test_broken_weights_raise(crops: np.ndarray) -> None:
    extract: Any = make_features(DEMO)
    with torch.no_grad():
        extract._network.visual_projection.weight.fill_(float("inf"))
    with pytest.raises(NetworkError, match="not finite"):
        extract(crops)


def test_a_network_without_weights_raises_even_for_one_crop(crops: np.ndarray) -> None:
    extract: Any = make_features(DEMO)
    with torch.no_grad():
        extract._network.visual_projection.weight.zero_()
    with pytest.raises(NetworkError, match="the same at every place of each of 1 crops"):
        extract(crops[:1])


def test_a_network_that_sees_positions_only_raises(crops: np.ndarray) -> None:
    extract: Any = make_features(DEMO)
    with torch.no_grad():
        extract._network.vision_model.embeddings.patch_embedding.weight.zero_()
    extract(crops[:1])
    extract(crops[:1])  # the same crop again tells nothing
    with pytest.raises(NetworkError, match="the same for two different images"):
        extract(crops[1:2])


def test_crops_of_one_colour_have_features() -> None:
    extract = make_features(DEMO)
    assert extract(np.zeros((2, 64, 64, 3), np.uint8)).std() > 0
