"""What networks are fed and what becomes of their answers, exactly: a stand-in keeps the one and gives known others.

Expected values are computed here, as the papers' own code has it: Pillow's bilinear filter on RGB, then each network's colours.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fourmill.core.coco import COCO_PANOPTIC, COCO_THINGS
from fourmill.core.labels import Picture
from fourmill.pseudolabel import detector, dpt, mask2former
from fourmill.pseudolabel.config import DetectorConfig, DptConfig, Mask2FormerConfig
from fourmill.pseudolabel.make import make_labeller

pytestmark = pytest.mark.usefixtures("one_thread")
Photo = Callable[..., np.ndarray]
CONFIGS = {
    "depth": DptConfig(weights="seeded:0"),
    "normal": DptConfig(weights="seeded:0"),
    "semseg": Mask2FormerConfig(weights="seeded:0"),
    "det": DetectorConfig(weights="seeded:0"),
}
NOT_IN_COCO = {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # of its 91 ids; DETR's networks have a class for each
SLOTS_91 = dict.fromkeys(NOT_IN_COCO, "N/A") | dict(
    zip((i for i in range(91) if i not in NOT_IN_COCO), COCO_THINGS, strict=True)
)


class StandIn(nn.Module):
    """Gives the same answer whatever it is fed, which it keeps."""

    def __init__(self, answer: Any, **facts: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**facts)
        self.fed: list[Tensor] = []
        self._answer = answer

    def forward(self, pixel_values: Tensor) -> Any:
        self.fed.append(pixel_values)
        return self._answer


@pytest.fixture
def label_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a labeller whose network is a stand-in says of one picture: (label, its config, network, picture)."""

    def make(label: str, config: Any, network: StandIn, rgb: np.ndarray) -> Any:
        for module in (dpt, mask2former, detector):
            monkeypatch.setattr(module, "load_network", lambda *given: (network, torch.device("cpu")))
        monkeypatch.setattr(dpt, "forward", lambda network, pixels: network(pixels))
        (answer,) = make_labeller(label, config).label_pictures([Picture(rgb)])
        return answer

    return make


def dpt_stand_in(output: Tensor) -> StandIn:
    return StandIn(output[None], is_hybrid=True)


def mask2former_stand_in(classes_QC: Tensor, masks_QHW: Tensor) -> StandIn:
    answer = SimpleNamespace(class_queries_logits=classes_QC[None], masks_queries_logits=masks_QHW[None])
    return StandIn(answer, num_queries=len(classes_QC), id2label=dict(enumerate(COCO_PANOPTIC)))


def detector_stand_in(logits_QC: Tensor, boxes_Q4: Tensor, id2label: dict[int, str]) -> StandIn:
    answer = SimpleNamespace(logits=logits_QC[None], pred_boxes=boxes_Q4[None])
    return StandIn(answer, id2label=id2label, model_type="rt_detr_v2")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def resized(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    """RGB in 0 to 255, channels first."""
    image = Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float64).transpose(2, 0, 1)


def reddish(rgb: np.ndarray) -> np.ndarray:
    """So that no two channels can be taken for one another."""
    return (rgb * np.array([1.0, 0.6, 0.2])).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "padded"), [(800, 1067, (800, 1088)), (1067, 800, (1088, 800))])
def test_mask2former_is_fed_standardised_rgb_with_zeros_at_the_bottom_and_right(
    height: int, width: int, padded: tuple[int, int], photo: Photo, label_by: Callable[..., Any]
) -> None:
    rgb = reddish(photo(60, 80) if width > height else photo(80, 60))
    network = mask2former_stand_in(noise(3, 134), noise(3, padded[0] // 4, padded[1] // 4))
    label_by("semseg", CONFIGS["semseg"], network, rgb)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    expected = np.zeros((3, *padded))
    expected[:, :height, :width] = (resized(rgb, height, width) - mean[:, None, None]) / std[:, None, None]
    (fed,) = network.fed
    assert fed.shape == (1, 3, *padded)
    np.testing.assert_allclose(fed[0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "fed", "padded"), [((130, 170), (64, 84), (64, 96)), ((170, 130), (84, 64), (96, 64))]
)
def test_classes_are_made_of_logits_in_the_order_of_the_original(
    size: tuple[int, int], fed: tuple[int, int], padded: tuple[int, int], photo: Photo, label_by: Callable[..., Any]
) -> None:
    """Masks to the padded input, padding off, to the image, sigmoid; classes by a softmax that "no object" takes part in."""
    classes_QC, masks_QHW = 4 * noise(12, 134), 8 * noise(12, padded[0] // 4, padded[1] // 4, seed=1)
    classes_QC[::2, 133] += 10  # so that every other query is hardly an object
    config = Mask2FormerConfig(weights="seeded:0", shorter_px=64, longer_px=96)
    ids = label_by("semseg", config, mask2former_stand_in(classes_QC, masks_QHW), photo(*size))
    inputs = F.interpolate(masks_QHW[None], padded, mode="bilinear", align_corners=False)[..., : fed[0], : fed[1]]
    shares = F.interpolate(inputs, size, mode="bilinear", align_corners=False)[0].sigmoid()
    expected = torch.einsum("qc,qhw->chw", classes_QC.softmax(-1)[:, :133], shares).argmax(0)
    assert ids.shape == size and len(np.unique(ids)) > 3
    assert np.mean(ids != expected.numpy()) < 0.001  # but near ties


@pytest.mark.parametrize(("label", "least"), [("depth", -1), ("normal", 0)])
def test_dpt_is_fed_rgb_up_to_736_pixels(label: str, least: int, photo: Photo, label_by: Callable[..., Any]) -> None:
    """512 x 768 is scaled by 736 / 768: its shorter side of 490.7 is closest to 480."""
    rgb = reddish(photo(512, 768))
    network = dpt_stand_in(noise(3, 480, 736) if label == "normal" else noise(480, 736))
    label_by(label, CONFIGS[label], network, rgb)
    (fed,) = network.fed
    assert fed.shape == (1, 3, 480, 736)
    np.testing.assert_allclose(fed[0].numpy(), least + (1 - least) * resized(rgb, 480, 736) / 255, atol=1e-5)


def places(side: int, fed: int) -> np.ndarray:
    """Where an image's pixels lie among those that a network saw, in its pixels: what a bilinear filter makes of a ramp."""
    return np.clip((np.arange(side) + 0.5) * fed / side - 0.5, 0, fed - 1)


def test_depth_is_the_output_brought_to_the_images_size_between_its_pixels(
    photo: Photo, label_by: Callable[..., Any]
) -> None:
    down, right = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    found = label_by("depth", CONFIGS["depth"], dpt_stand_in((down + right) / 100), photo(40, 75))
    expected = (places(40, 32)[:, None] + places(75, 64)) / 100
    np.testing.assert_allclose(found.label, expected, atol=1e-5)


def test_normals_are_twice_the_output_less_1_in_the_networks_order_of_channels(
    photo: Photo, label_by: Callable[..., Any]
) -> None:
    """And as long as they come: nobody makes them unit vectors."""
    down, right = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    network = dpt_stand_in(torch.stack([right / 100, down / 100 + 0.3, torch.full((32, 64), 0.9)]))
    found = label_by("normal", CONFIGS["normal"], network, photo(40, 75))
    x = np.broadcast_to(2 * (places(75, 64) / 100) - 1, (40, 75))
    y = np.broadcast_to(2 * (places(40, 32)[:, None] / 100 + 0.3) - 1, (40, 75))
    np.testing.assert_allclose(found.label, np.stack([x, y, np.full((40, 75), 0.8)], -1), atol=1e-5)


def test_a_detector_is_fed_rgb_squashed_to_a_square(photo: Photo, label_by: Callable[..., Any]) -> None:
    rgb = reddish(photo(60, 100))
    network = detector_stand_in(noise(4, 80), torch.rand(4, 4), dict(enumerate(COCO_THINGS)))
    label_by("det", CONFIGS["det"], network, rgb)
    (fed,) = network.fed
    assert fed.shape == (1, 3, 640, 640)
    np.testing.assert_allclose(fed[0].numpy(), resized(rgb, 640, 640) / 255, atol=1e-6)


@pytest.mark.parametrize("id2label", [SLOTS_91, dict(enumerate(sorted(["N/A", *COCO_THINGS])))], ids=["91", "sorted"])
def test_a_box_has_the_corners_of_its_query_and_the_name_of_its_class(
    id2label: dict[int, str], photo: Photo, label_by: Callable[..., Any]
) -> None:
    """Whatever order a network has its classes in, and whatever other ones."""
    assert [SLOTS_91[i] for i in (17, 62, 72, 90)] == ["cat", "chair", "tv", "toothbrush"]
    ids = {name: i for i, name in id2label.items()}
    logits = torch.full((5, len(id2label)), -9.0)
    sure = {(3, "chair"): 0.95, (1, "cat"): 0.9, (1, "tv"): 0.8, (0, "tv"): 0.7, (2, "chair"): 0.45, (4, "N/A"): 0.99}
    for (query, name), score in sure.items():
        logits[query, ids[name]] = float(np.log(score / (1 - score)))
    centres_and_sizes = [
        (0.5, 0.4, 0.2, 0.6),
        (0.25, 0.75, 0.3, 0.1),
        (0.5, 0.5, 0.9, 0.9),
        (0.8, 0.3, 0.1, 0.5),
        (0.5, 0.5, 0.4, 0.4),
    ]
    network = detector_stand_in(logits, torch.tensor(centres_and_sizes), id2label)
    boxes = label_by("det", CONFIGS["det"], network, photo(60, 100))
    assert [box.class_name for box in boxes] == ["chair", "cat", "tv", "tv"]
    corners = [(box.xmin, box.ymin, box.xmax, box.ymax) for box in boxes]
    second = (0.1, 0.7, 0.4, 0.8)
    np.testing.assert_allclose(corners, [(0.75, 0.05, 0.85, 0.55), second, second, (0.4, 0.1, 0.6, 0.7)], atol=2e-6)
    # RT-DETR's least score is 0.5, which is stored as the paper's 0.6.
    np.testing.assert_allclose([box.score for box in boxes], [0.96, 0.92, 0.84, 0.76], atol=1e-5)
