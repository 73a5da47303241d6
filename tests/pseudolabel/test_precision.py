"""bfloat16, channels last and torch.compile are settings: with them on, labels stay within stated bounds of float32's.

The bounds hold for tiny seeded networks, whose answers are spread over their whole range; each is about three times what
was measured. bfloat16 has 8 bits of precision: 1/256 in an operation.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fourmill.core.labels import Picture
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.labeller import Labelled
from fourmill.pseudolabel.make import make_features, make_labeller

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"depth": {"longer_px": 96}, "normal": {"longer_px": 96}, "semseg": {"shorter_px": 64, "longer_px": 96}}
CONFIGS = {label: config.model_copy(update=SMALL.get(label, {})) for label, config in seeded_labellers(1).items()}
DEPTH_MEAN, DEPTH_MOST = 0.01, 0.1  # of a range of 1
NORMAL_MEAN, NORMAL_MOST = 0.02, 0.2  # of a range of 2
CLASSES_CHANGED = 0.15  # share of pixels; a random network's classes are often near a tie
BOX_MEAN, SCORE_MEAN = 0.01, 0.02  # of boxes in both, corners as shares of the image
FEATURES = 0.03  # root mean square, relative


def labels(label: str, pictures: list[Picture], change: dict[str, Any]) -> list[Any]:
    labeller: Any = make_labeller(label, seeded(label, change))
    return [one.label if isinstance(one, Labelled) else one for one in labeller.label_pictures(pictures)]


def seeded(label: str, change: dict[str, Any]) -> Any:
    """The same random network, run in another way: a seed's network does not depend on how it is run."""
    return CONFIGS[label].model_copy(update=change)


@pytest.fixture
def pictures(photo: Callable[..., np.ndarray]) -> list[Picture]:
    return [Picture(photo(64, 96, seed)) for seed in range(4)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("label", "mean", "most"), [("depth", DEPTH_MEAN, DEPTH_MOST), ("normal", NORMAL_MEAN, NORMAL_MOST)]
)
def test_depth_and_normals_agree(label: str, mean: float, most: float, precision: str, pictures: list[Picture]) -> None:
    exact, less = (labels(label, pictures, change) for change in ({}, {"precision": precision}))
    off = np.abs(np.stack(exact) - np.stack(less))
    assert 0 < off.mean() < mean and off.max() < most


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_classes_agree(precision: str, pictures: list[Picture]) -> None:
    exact, less = (labels("semseg", pictures, change) for change in ({}, {"precision": precision}))
    assert np.mean(np.stack(exact) != np.stack(less)) < CLASSES_CHANGED


def test_boxes_agree(pictures: list[Picture]) -> None:
    """Not in fp16: inside of the seeded detector values lie near 1e-9, where fp16 has only zeros."""
    exact, less = (labels("det", pictures, change) for change in ({}, {"precision": "bf16"}))
    matched = total = 0
    corners, scores = [], []
    for a, b in zip(exact, less, strict=True):
        total += len(a)
        for box in a:
            others = [other for other in b if other.class_name == box.class_name]
            if others:
                off = [abs(o.xmin - box.xmin) + abs(o.ymin - box.ymin) for o in others]
                near = others[int(np.argmin(off))]
                matched += 1
                corners.append(min(off) / 2)
                scores.append(abs(near.score - box.score))
    assert total and matched > 0.8 * total
    assert np.mean(corners) < BOX_MEAN and np.mean(scores) < SCORE_MEAN


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_features_agree(precision: str, photo: Callable[..., np.ndarray]) -> None:
    crops = np.stack([photo(64, 64, seed) for seed in range(3)])
    exact, less = (make_features(seeded("clip", change))(crops) for change in ({}, {"precision": precision}))
    assert 0 < np.sqrt(np.mean((exact - less) ** 2) / np.mean(exact**2)) < FEATURES


@pytest.mark.parametrize("label", ["depth", "semseg", "det"])
def test_channels_last_change_nothing_to_speak_of(label: str, pictures: list[Picture]) -> None:
    exact, other = (labels(label, pictures[:2], how) for how in ({}, {"channels_last": True}))
    for a, b in zip(exact, other, strict=True):
        if label == "semseg":
            assert np.mean(a != b) < 0.01
        elif label == "depth":
            assert np.abs(a - b).max() < 1e-3
        else:
            assert [box.class_name for box in a] == [box.class_name for box in b]


def test_a_compiled_network_labels_as_one_that_is_not(pictures: list[Picture]) -> None:
    """By dynamo alone: what a backend makes of its graphs is the backend's."""
    exact, other = (labels("depth", pictures[:1], how) for how in ({}, {"compile_backend": "eager"}))
    assert np.abs(exact[0] - other[0]).max() < 1e-5
