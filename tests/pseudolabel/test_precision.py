"""Half precision and channels last are settings: with them on, alone or together, labels stay within bounds of float32's.

The bounds hold for tiny seeded networks, whose answers are spread over their whole range; each is about three times what
was measured. bfloat16 has 8 bits of precision: 1/256 in an operation.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.core.labels import Box, Picture
from fourmill.core.store import LocalStore
from fourmill.pseudolabel import detector, dpt
from fourmill.pseudolabel.choices import paper_labellers, seeded_labellers
from fourmill.pseudolabel.config import VitDetConfig
from fourmill.pseudolabel.convert import add_weights
from fourmill.pseudolabel.labeller import Labelled, NetworkError
from fourmill.pseudolabel.make import make_features, make_labeller
from fourmill.pseudolabel.named_weights import at_hand
from fourmill.pseudolabel.network import Forward
from fourmill.pseudolabel.seeding import probe
from fourmill.pseudolabel.vitdet_keys import VitDetArchitecture, vitdet_shapes

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"depth": {"longer_px": 96}, "normal": {"longer_px": 96}, "semseg": {"shorter_px": 64, "longer_px": 96}}
CONFIGS = {label: config.model_copy(update=SMALL.get(label, {})) for label, config in seeded_labellers(1).items()}
DEPTH_MEAN, DEPTH_MOST = 0.01, 0.1  # of a range of 1
NORMAL_MEAN, NORMAL_MOST = 0.02, 0.2  # of a range of 2
CLASSES_CHANGED = 0.15  # share of pixels; a random network's classes are often near a tie
BOXES_FOUND, SAME_BOX = 0.85, 0.03  # share of boxes that are found again; corners as shares of the image
BOX_MEDIAN = (
    0.01  # of differences in corners and scores; a random detector's queries are nearly tied, so some are others
)
VITDET_FOUND = 0.7  # which of several boxes suppresses the others is nearly tied too
VITDET_MAPS = {"bf16": 0.04, "fp16": 0.005}  # of the backbone's maps, root mean square, relative
FEATURES = 0.03  # root mean square, relative
OF_THE_PROFILE = paper_labellers(precision="bf16")["depth"].model_dump(include={"precision", "channels_last"})
LESS = {"bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"}, "cc12m_4m7": OF_THE_PROFILE}
in_less = pytest.mark.parametrize("change", LESS.values(), ids=LESS)


def labels(label: str, pictures: list[Picture], change: dict[str, Any]) -> list[Any]:
    labeller: Any = make_labeller(label, seeded(label, change))
    return [one.label if isinstance(one, Labelled) else one for one in labeller.label_pictures(pictures)]


def seeded(label: str, change: dict[str, Any]) -> Any:
    """The same random network, run in another way: a seed's network does not depend on how it is run."""
    return CONFIGS[label].model_copy(update=change)


@pytest.fixture
def pictures(photo: Callable[..., np.ndarray]) -> list[Picture]:
    return [Picture(photo(64, 96, seed)) for seed in range(4)]


@in_less
@pytest.mark.parametrize(
    ("label", "mean", "most"), [("depth", DEPTH_MEAN, DEPTH_MOST), ("normal", NORMAL_MEAN, NORMAL_MOST)]
)
def test_depth_and_normals_agree(
    label: str, mean: float, most: float, change: dict[str, Any], pictures: list[Picture]
) -> None:
    exact, less = (labels(label, pictures, how) for how in ({}, change))
    off = np.abs(np.stack(exact) - np.stack(less))
    assert 0 < off.mean() < mean and off.max() < most


@in_less
def test_classes_agree(change: dict[str, Any], pictures: list[Picture]) -> None:
    exact, less = (labels("semseg", pictures, how) for how in ({}, change))
    assert np.mean(np.stack(exact) != np.stack(less)) < CLASSES_CHANGED


@in_less
def test_boxes_agree(change: dict[str, Any], pictures: list[Picture]) -> None:
    exact, less = (trained_like(how).label_pictures(pictures) for how in ({}, change))
    near = [near_to(box, boxes) for found, boxes in zip(exact, less, strict=True) for box in found]
    assert near and np.mean([found is not None for found in near]) >= BOXES_FOUND
    assert np.median([off for found in near if found for off in found]) < BOX_MEDIAN


def test_boxes_of_vitdet_agree(tmp_path: Path, pictures: list[Picture]) -> None:
    """Runs in the environment of infra/detectron2. Backbone and heads compute in less; scores and corners come of float32."""
    pytest.importorskip("detectron2", reason="not in this environment, and must not be")
    from fourmill.pseudolabel.vitdet import VitDetLabeller

    weights = at_hand(VitDetConfig(weights=random_vitdet(tmp_path)), LocalStore(tmp_path / "store"))
    changes: list[dict[str, Any]] = [{"score_threshold": 0.3}, *LESS.values()]
    exact, *others = (
        VitDetLabeller(weights.model_copy(update={"score_threshold": 0.05} | change)) for change in changes
    )
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 4 - 2
    boxes: Any = exact.label_pictures(pictures)
    for less, change in zip(others, LESS.values(), strict=True):
        for a, b in zip(exact._forward(pixels), less._forward(pixels), strict=True):
            assert 0 < float((a - b).norm() / a.norm()) < VITDET_MAPS[change["precision"]]
        again: Any = less.label_pictures(pictures)
        near = [near_to(box, found) for first, found in zip(boxes, again, strict=True) for box in first]
        assert near and np.mean([found is not None for found in near]) >= VITDET_FOUND
        assert np.median([off for found in near if found for off in found]) < BOX_MEDIAN


RPN, STAGE = "proposal_generator.rpn_head.conv.conv", "roi_heads.box_head."
TOO_LARGE = {
    "features": {"backbone.simfp_4.0.weight": 1e6},  # a norm makes them small again, as after the heads' convolutions
    "proposals": {f"{RPN}0.weight": 1e5, f"{RPN}0.bias": 1e5, f"{RPN}1.weight": 1e-5},
    "boxes of the first stage": {f"{STAGE}0.conv1.weight": 1e6},
    "boxes of the last stage": {f"{STAGE}2.conv1.weight": 1e6},
}


@pytest.mark.parametrize("factors", TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_a_vitdet_that_overflows_is_a_wrong_network_and_no_image_without_objects(
    factors: dict[str, float], tmp_path: Path, pictures: list[Picture]
) -> None:
    """Runs in the environment of infra/detectron2. Numbers inside are too large for fp16, and fine in fp32 and bf16."""
    pytest.importorskip("detectron2", reason="not in this environment, and must not be")
    from fourmill.pseudolabel.vitdet import VitDetLabeller

    weights = at_hand(VitDetConfig(weights=random_vitdet(tmp_path, factors)), LocalStore(tmp_path / "store"))
    precisions = ("fp32", "bf16", "fp16")
    exact, half, less = (
        VitDetLabeller(weights.model_copy(update={"score_threshold": 0.05, "precision": p})) for p in precisions
    )
    assert all(isinstance(boxes, list) and boxes for boxes in exact.label_pictures(pictures))
    assert all(isinstance(boxes, list) and boxes for boxes in half.label_pictures(pictures))
    with pytest.raises(NetworkError, match=r"(features|scores and boxes) from .* not finite in"):
        less.label_pictures(pictures)


def test_corners_that_overflow_where_boxes_are_computed_are_the_networks_fault(
    tmp_path: Path, pictures: list[Picture]
) -> None:
    """Runs in the environment of infra/detectron2. What the last layer says is finite; times a box's width it is not."""
    pytest.importorskip("detectron2", reason="not in this environment, and must not be")
    from fourmill.pseudolabel.vitdet import VitDetLabeller

    labeller = VitDetLabeller(at_hand(VitDetConfig(weights=random_vitdet(tmp_path)), LocalStore(tmp_path / "store")))
    labeller._model.roi_heads.box_predictor[0].bbox_pred.part.bias.fill_(3e38)
    with pytest.raises(NetworkError, match=r"boxes from .* are not finite: .* infinite or NaN"):
        labeller.label_pictures(pictures)


def random_vitdet(folder: Path, factors: Mapping[str, float] | None = None) -> str:
    """A small ViTDet in the store below a folder; its values keep their size from layer to layer, but for some factors."""
    small = VitDetArchitecture(
        image_px=128, embed_dim=32, depth=4, num_heads=2, window_size=4, global_blocks=(1, 3), channels=16, box_dim=24
    )
    rng, state = np.random.default_rng(0), {}
    for key, shape in vitdet_shapes(small).items():
        drawn = rng.normal(size=shape).astype(np.float32)
        state[key] = drawn / np.float32(np.sqrt(np.prod(shape[1:]))) if len(shape) > 1 else 0.1 * drawn
        if len(shape) == 1 and key.endswith("weight"):  # of a norm
            state[key] += 1
        if "cls_score.weight" in key:  # else all classes are as likely
            state[key] *= 6
        state[key] *= np.float32((factors or {}).get(key, 1))
    (folder / "model.pkl").write_bytes(pickle.dumps({"model": state}, protocol=2))
    added = add_weights(LocalStore(folder / "store"), "vitdet", folder / "model.pkl", "random", None, small)
    return f"stored:vitdet/{added.digest}"


def trained_like(change: dict[str, Any]) -> Any:
    """The seeded detector with batch norms that fit its images, as training leaves them.

    Without, values inside of it lie near 1e-9, where fp16 has only zeros.
    """
    config: Any = seeded("det", change)
    labeller: Any = make_labeller("det", config)
    norms = [module for module in labeller._network.modules() if hasattr(module, "running_mean")]
    hooks = [norm.register_forward_pre_hook(fit) for norm in norms]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        labeller._network(pixel_values=probe(config.input_px, 4))
        for hook in hooks:
            hook.remove()
        detector._tune(labeller._network, config)
    return labeller


def fit(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)


def near_to(box: Box, others: list[Box]) -> tuple[float, float] | None:
    """Differences in corners (their mean) and in score to the same object among others, when it is there."""
    found = [
        (np.abs(np.subtract(corners(other), corners(box))).mean(), abs(other.score - box.score))
        for other in others
        if other.class_name == box.class_name
    ]
    least = min(found, default=(1.0, 1.0))
    return least if least[0] < SAME_BOX else None


def corners(box: Box) -> tuple[float, float, float, float]:
    return box.xmin, box.ymin, box.xmax, box.ymax


@in_less
def test_features_agree(change: dict[str, Any], photo: Callable[..., np.ndarray]) -> None:
    crops = np.stack([photo(64, 64, seed) for seed in range(3)])
    exact, less = (make_features(seeded("clip", how))(crops) for how in ({}, change))
    assert 0 < np.sqrt(np.mean((exact - less) ** 2) / np.mean(exact**2)) < FEATURES


@in_less
@pytest.mark.parametrize("label", ["depth", "normal", "semseg", "det", "clip"])
def test_weights_made_smaller_once_give_the_same_numbers(
    label: str, change: dict[str, Any], pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autocast makes them smaller for each batch."""

    def made() -> list[Any]:
        config = seeded(label, change)
        if label == "clip":
            return list(make_features(config)(np.stack([picture.at(64, 64) for picture in pictures])))
        labeller: Any = trained_like(change) if label == "det" else make_labeller(label, config)
        return [one.label if isinstance(one, Labelled) else one for one in labeller.label_pictures(pictures)]

    found = made()
    monkeypatch.setattr(Forward, "_make_ready", lambda self: None)
    for a, b in zip(found, made(), strict=True):
        assert a == b if label == "det" else np.array_equal(a, b)


@pytest.mark.parametrize("change", [{}, {"precision": "bf16"}, {"precision": "fp16"}])
@pytest.mark.parametrize("label", ["depth", "normal"])
def test_weights_standardised_once_give_the_same_numbers(
    label: str, change: dict[str, Any], pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers standardises them for each batch."""
    from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

    config = seeded(label, change)
    labeller: Any = make_labeller(label, config)
    found = [one.label for one in labeller.label_pictures(pictures)]
    assert not [m for m in labeller._network.modules() if isinstance(m, WeightStandardizedConv2d)]
    monkeypatch.setattr(dpt, "_standardise_once", lambda network: None)
    other: Any = make_labeller(label, config)
    exact = [one.label for one in other.label_pictures(pictures)]
    assert [m for m in other._network.modules() if isinstance(m, WeightStandardizedConv2d)]
    assert all(map(np.array_equal, found, exact))


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
