"""Seeded networks of every kind: any image gets a label of its size, the same each time; a wrong network raises."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.core.coco import COCO_THINGS
from fourmill.core.crops import centre_crop
from fourmill.core.imagenet import IMAGENET_MEAN, IMAGENET_STD
from fourmill.core.labels import Box, Picture, encode_boxes, encode_depth, encode_normal, encode_semseg
from fourmill.core.sequences import detection_text
from fourmill.pseudolabel import detector, dpt, mask2former
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.config import DetectorConfig, DptConfig
from fourmill.pseudolabel.labeller import Answer, Clocked, Concurrent, Fed, Labelled, NetworkError, Rejected
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.members import FORMATS
from fourmill.pseudolabel.network import batches, shortest_edge
from fourmill.pseudolabel.stored import WeightsMissingError

SMALL = {
    label: config.model_copy(update={"longer_px": 96} if hasattr(config, "longer_px") else {})
    for label, config in seeded_labellers(1).items()
}
SIZES = [(64, 64), (40, 90), (130, 50), (40, 90), (1, 1), (3, 200)]
LABELS = ("depth", "normal", "semseg", "det")
pytestmark = pytest.mark.usefixtures("one_thread")
Photo = Callable[..., np.ndarray]


@pytest.fixture
def pictures(photo: Photo) -> list[Picture]:
    return [Picture(photo(height, width, seed)) for seed, (height, width) in enumerate(SIZES)]


@pytest.mark.parametrize("label", LABELS)
def test_a_network_says_how_it_wants_to_be_asked(label: str) -> None:
    labeller = make_labeller(label, SMALL[label])
    assert isinstance(labeller, Concurrent) and isinstance(labeller, Fed) and isinstance(labeller, Clocked)
    assert labeller.streams >= 1 and (labeller.clock is not None) == torch.cuda.is_available()


def bare(answer: Answer) -> Any:
    """The label without what its labeller says of it."""
    return answer.label if isinstance(answer, Labelled) else answer


def same(a: Answer, b: Answer) -> bool:
    a, b = bare(a), bare(b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a == b


@pytest.mark.parametrize("label", LABELS)
def test_every_image_gets_a_label_of_its_size_that_can_be_stored(label: str, pictures: list[Picture]) -> None:
    labels = [bare(answer) for answer in make_labeller(label, SMALL[label]).label_pictures(pictures)]
    assert len(labels) == len(pictures)
    for (height, width), found in zip(SIZES, labels, strict=True):
        if isinstance(found, np.ndarray):
            assert found.shape[:2] == (height, width)
        assert not isinstance(found, Rejected)
        assert FORMATS[label].encode(found)


@pytest.mark.parametrize("label", LABELS)
def test_the_seed_decides_everything(label: str, pictures: list[Picture]) -> None:
    first, again = (make_labeller(label, SMALL[label]).label_pictures(pictures[:2]) for _ in range(2))
    other = make_labeller(label, SMALL[label].model_copy(update={"weights": "seeded:2"})).label_pictures(pictures[:2])
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


@pytest.mark.parametrize("label", LABELS)
def test_a_seeded_network_sees_something(label: str, pictures: list[Picture]) -> None:
    labels = [bare(answer) for answer in make_labeller(label, SMALL[label]).label_pictures(pictures[:4])]
    if label == "det":
        boxes = [box for found in labels for box in found if isinstance(box, Box)]
        assert boxes and {box.class_name for box in boxes} <= set(COCO_THINGS)
        assert all(box.score >= 0.6 for box in boxes)
        return
    spreads = [float(np.asarray(found).std()) for found in labels]
    assert min(spreads) > (0.02 if label != "semseg" else 0)


@pytest.mark.parametrize("label", LABELS)
def test_a_saved_network_labels_like_the_one_it_was_saved_from(
    label: str, tmp_path: Path, pictures: list[Picture]
) -> None:
    seeded: Any = make_labeller(label, SMALL[label])
    seeded._network.save_pretrained(tmp_path / label)
    loaded = make_labeller(label, SMALL[label].model_copy(update={"weights": str(tmp_path / label)}))
    assert all(map(same, seeded.label_pictures(pictures), loaded.label_pictures(pictures)))
    assert loaded.weights_digest != seeded.weights_digest


@pytest.mark.parametrize("label", LABELS)
def test_the_size_of_batches_changes_nothing_to_speak_of(label: str, photo: Photo) -> None:
    pictures = [Picture(photo(48, 80, seed)) for seed in range(5)]
    one, many = (
        make_labeller(label, SMALL[label].model_copy(update={"batch_size": size})).label_pictures(pictures)
        for size in (1, 4)
    )
    for a, b in zip(map(bare, one), map(bare, many), strict=True):
        if label == "semseg":
            assert np.mean(np.asarray(a) != np.asarray(b)) < 0.01
        elif isinstance(a, np.ndarray):
            assert np.abs(a - np.asarray(b)).max() < 1e-3
        else:
            assert isinstance(b, list) and len(a) == len(b)


def test_batches_hold_equal_sizes_and_every_position_once() -> None:
    sizes = [(1, 2), (3, 4), (1, 2), (1, 2), (3, 4)]
    assert list(batches(sizes, 2)) == [[0, 2], [3], [1, 4]]


@pytest.mark.parametrize(
    ("size", "fed"),
    [
        ((384, 384), (384, 384)),
        ((480, 352), (480, 352)),
        ((333, 500), (320, 512)),  # 10.4 and 15.6 strides
        ((768, 512), (736, 480)),  # 768 itself is not below 768
        ((512, 768), (480, 736)),
        ((751, 751), (736, 736)),
        ((1, 1), (32, 32)),
        ((20000, 3), (736, 32)),
    ],
)
def test_dpt_sees_the_closest_multiples_of_32_below_768(size: tuple[int, int], fed: tuple[int, int]) -> None:
    assert dpt.fed_size(size, 736) == fed


def test_dpt_agrees_with_transformers_where_that_runs() -> None:
    labeller: Any = make_labeller("depth", SMALL["depth"])
    pixels = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = labeller._network(pixels).predicted_depth
        ours = dpt.forward(labeller._network, pixels)
    assert torch.equal(ours, theirs)


def test_depth_is_fed_in_plus_minus_one_and_normals_in_zero_to_one(
    photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: dict[str, tuple[float, float]] = {}
    real = dpt.forward
    for label in ("depth", "normal"):

        def spy(network: Any, pixels: torch.Tensor, label: str = label) -> torch.Tensor:
            fed[label] = (float(pixels.min()), float(pixels.max()))
            return real(network, pixels)

        monkeypatch.setattr(dpt, "forward", spy)
        white = np.full((32, 32, 3), 255, np.uint8)
        white[:16] = 0
        make_labeller(label, SMALL[label]).label_pictures([Picture(white)])
    assert fed == {"depth": (-1.0, 1.0), "normal": (0.0, 1.0)}


@pytest.mark.parametrize(
    ("size", "fed"),
    [((480, 640), (800, 1067)), ((640, 480), (1067, 800)), ((300, 1000), (400, 1333)), ((1, 9000), (1, 1333))],
)
def test_mask2former_sees_800_pixels_on_the_shorter_side_at_most_1333_on_the_longer(
    size: tuple[int, int], fed: tuple[int, int]
) -> None:
    assert shortest_edge(size, 800, 1333) == fed


@pytest.mark.parametrize(
    ("size", "fed"),
    [((39, 78), (666, 1333)), ((78, 39), (1333, 666)), ((33, 86), (511, 1333)), ((744, 444), (1333, 795))],
)
def test_halves_of_a_pixel_are_rounded_as_detectron2_rounds_them(size: tuple[int, int], fed: tuple[int, int]) -> None:
    """What its ResizeShortestEdge gives at commit 02b5c4e2: reduced in one step, these shorter sides would end in a half."""
    assert shortest_edge(size, 800, 1333) == fed


def test_classes_come_from_masks_at_the_images_size() -> None:
    """Two queries: class 5 in the left half, class 7 in the right; the border stays sharp when enlarged."""
    classes = torch.full((2, 134), -20.0)
    classes[0, 5] = classes[1, 7] = 20.0
    masks = torch.full((2, 4, 4), -8.0)
    masks[0, :, :2] = masks[1, :, 2:] = 8.0
    ids = np.asarray(mask2former._semantic(classes, masks, (16, 16)))
    assert ids.dtype == np.uint8
    assert (ids[:, :8] == 5).all() and (ids[:, 8:] == 7).all()


def test_masks_of_a_large_image_are_enlarged_in_bands_as_they_are_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.randn(3, 13, 17, generator=torch.Generator().manual_seed(0))
    whole = mask2former.enlarged_rows(masks, (50, 61), 0, 50)
    for top, bottom in ((0, 7), (7, 49), (49, 50)):
        assert torch.allclose(mask2former.enlarged_rows(masks, (50, 61), top, bottom), whole[:, top:bottom], atol=1e-5)
    classes = torch.randn(3, 134, generator=torch.Generator().manual_seed(1)) * 4
    ids = mask2former._semantic(classes, masks, (50, 61))
    monkeypatch.setattr(mask2former, "_MASK_VALUES_AT_ONCE", 3 * 61 * 8)
    assert np.mean(np.asarray(mask2former._semantic(classes, masks, (50, 61))) != np.asarray(ids)) < 0.001


def test_clamped_outputs_are_counted_before_they_are_clamped(photo: Photo) -> None:
    labeller: Any = make_labeller("depth", SMALL["depth"])
    (before,) = labeller.label_pictures([Picture(photo(64, 64))])
    with torch.no_grad():
        labeller._network.head.head[4].bias += 10  # everything lies above 1, by different amounts
    (after,) = labeller.label_pictures([Picture(photo(64, 64))])
    assert before.figures["clamped"] < 0.2 and after.figures == {"clamped": 1.0}
    assert (after.label == 1).all()


def test_a_pixel_is_clamped_when_one_component_of_its_normal_is(photo: Photo) -> None:
    labeller: Any = make_labeller("normal", SMALL["normal"])
    with torch.no_grad():
        labeller._network.head.head[4].bias[1] += 10
    (found,) = labeller.label_pictures([Picture(photo(64, 64))])
    assert found.figures == {"clamped": 1.0}


def test_mask2former_weights_with_other_classes_are_refused(tmp_path: Path) -> None:
    seeded: Any = make_labeller("semseg", SMALL["semseg"])
    seeded._network.config.id2label = {**seeded._network.config.id2label, 3: "moped"}
    seeded._network.save_pretrained(tmp_path)
    with pytest.raises(NetworkError, match="3 is 'moped', not 'motorcycle'"):
        make_labeller("semseg", SMALL["semseg"].model_copy(update={"weights": str(tmp_path)}))


def test_detector_classes_are_matched_by_name() -> None:
    things = dict(enumerate(COCO_THINGS))
    assert detector.thing_names(things, "w") == things
    voc = things | {3: "motorbike", 4: "Aeroplane", 57: "sofa", 58: "pottedplant", 60: "diningtable", 62: "tvmonitor"}
    assert detector.thing_names(voc, "w") == things
    at = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # COCO's own ids, up to 90
    slots = dict.fromkeys(range(91), "N/A") | dict(zip(at, COCO_THINGS, strict=True))
    assert detector.thing_names(slots, "w") == dict(zip(at, COCO_THINGS, strict=True))


def test_a_detector_that_lacks_one_of_cocos_things_is_refused_with_its_name() -> None:
    things = dict(enumerate(COCO_THINGS))
    with pytest.raises(NetworkError, match=r"no class for 2 .*\(airplane, cow\); its other classes: bovine, plane"):
        detector.thing_names(things | {4: "bovine", 19: "plane"}, "w")
    with pytest.raises(NetworkError, match=r"no class for 80 .*\(person, .*, \.\.\.\); its other classes: LABEL_0"):
        detector.thing_names({0: "LABEL_0"}, "w")
    with pytest.raises(NetworkError, match=r"no class for 1 .*\(toothbrush\)"):  # the network has 80 outputs
        detector.thing_names({**{i: name for i, name in things.items() if i < 79}, 90: "toothbrush"}, "w")


def test_detector_scores_know_both_kinds_of_head() -> None:
    logits = torch.tensor([[0.0, 2.0, 4.0]])
    assert torch.equal(detector.scores(logits, 3), logits.sigmoid())
    assert torch.allclose(detector.scores(logits, 2), logits.softmax(-1)[:, :2])


def test_boxes_are_sorted_by_score_inside_the_image_and_bounded_in_number(pictures: list[Picture]) -> None:
    config = SMALL["det"].model_copy(update={"score_threshold": 0.001, "max_boxes": 7})
    for found in make_labeller("det", config).label_pictures(pictures):
        assert isinstance(found, list) and len(found) == 7
        assert [box.score for box in found] == sorted((box.score for box in found), reverse=True)


def test_every_detector_has_a_threshold_of_its_own_which_is_stored_as_the_papers() -> None:
    config = DetectorConfig(weights="w")
    assert detector.threshold_of(config, "d_fine") == 0.5
    assert detector.threshold_of(config.model_copy(update={"score_threshold": 0.3}), "d_fine") == 0.3
    with pytest.raises(NetworkError, match=r"w is a yolos.*set labellers\.det\.score_threshold"):
        detector.threshold_of(config, "yolos")


def test_a_detector_is_not_fed_colours_that_none_of_its_kind_was_trained_with() -> None:
    config = DetectorConfig(weights="w")
    for kind in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
        detector.check_colours(config, kind)
    with pytest.raises(NetworkError, match=r"w is a yolos, which .*set labellers\.det\.mean and \.std"):
        detector.check_colours(config, "yolos")
    detector.check_colours(config.model_copy(update={"mean": IMAGENET_MEAN, "std": IMAGENET_STD}), "yolos")

    assert [detector.rescaled(score, 0.5) for score in (0.5, 0.75, 1.0)] == [0.6, 0.8, 1.0]
    assert detector.rescaled(0.87, 0.6) == pytest.approx(0.87)
    assert detector.rescaled(1.0, 1.0) == 1.0


@pytest.mark.parametrize("threshold", [0.0, 0.123457, 0.5, 0.61, 1.0])
def test_a_box_at_a_detectors_threshold_is_written(threshold: float) -> None:
    box = Box(0.25, 0.25, 0.5, 0.5, detector.rescaled(threshold, threshold), "cat")
    assert detection_text([box], 64, 64, centre_crop(64, 64))


def test_a_folder_that_does_not_load_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dpt", "is_hybrid": true, "hidden_size": 7}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WeightsMissingError, match=r"depth labeller: .* does not load as DPTForDepthEstimation"):
        make_labeller("depth", DptConfig(weights=str(tmp_path)))


def test_depth_weights_are_not_taken_for_normals(tmp_path: Path) -> None:
    depth: Any = make_labeller("depth", SMALL["depth"])
    depth._network.save_pretrained(tmp_path)
    with pytest.raises(NetworkError, match="normal labeller"):
        make_labeller("normal", SMALL["normal"].model_copy(update={"weights": str(tmp_path)}))


def test_weights_that_lack_a_key_are_refused_by_its_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    depth: Any = make_labeller("depth", SMALL["depth"])
    depth._network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["neck.convs.1.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NetworkError, match=r"missing keys: neck\.convs\.1\.weight"):
        make_labeller("depth", SMALL["depth"].model_copy(update={"weights": str(tmp_path)}))


def test_mask2former_loads_in_the_layout_of_its_public_file(tmp_path: Path, pictures: list[Picture]) -> None:
    """The file of 2022 holds Swin's index of relative positions, now computed, and no last norm, which a backbone lacks."""
    from safetensors.torch import load_file, save_file

    seeded: Any = make_labeller("semseg", SMALL["semseg"])
    seeded._network.save_pretrained(tmp_path)
    swin, file = "model.pixel_level_module.encoder", tmp_path / "model.safetensors"
    state = load_file(file)
    index = seeded._network.get_submodule(f"{swin}.swin.encoder.layers.0.blocks.0.attention.relative_position_bias")
    for key in [key for key in state if re.search(r"swin\.layernorm|encoder\.layernorm", key)]:
        del state[key]
    state[f"{swin}.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = index.relative_position_index
    save_file(state, file, metadata={"format": "pt"})
    config = SMALL["semseg"].model_copy(update={"weights": str(tmp_path)})
    loaded = make_labeller("semseg", config)
    assert all(map(same, seeded.label_pictures(pictures[:2]), loaded.label_pictures(pictures[:2])))
    state[f"{swin}.embeddings.odd"] = torch.zeros(1)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(NetworkError, match=r"unexpected keys: \S*embeddings\.odd$"):
        make_labeller("semseg", config)


def test_weights_of_another_shape_are_refused_by_name_and_shapes(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    depth: Any = make_labeller("depth", SMALL["depth"])
    depth._network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["neck.convs.1.weight"] = state["neck.convs.1.weight"][:5].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NetworkError, match=r"neck\.convs\.1\.weight \(5, 24, 3, 3\), expected \(24, 24, 3, 3\)"):
        make_labeller("depth", SMALL["depth"].model_copy(update={"weights": str(tmp_path)}))


def test_every_encoder_takes_what_its_labeller_gives() -> None:
    encoders = {"depth": encode_depth, "normal": encode_normal, "semseg": encode_semseg, "det": encode_boxes}
    assert {label: FORMATS[label].encode for label in encoders} == encoders
