"""What tells a wrong network from an odd image: NaN, and answers that do not depend on what is seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.core.labels import Picture
from fourmill.pseudolabel.choices import seeded_labellers
from fourmill.pseudolabel.labeller import Labelled, NetworkError, Rejected
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.watch import Watch, finite_share

SMALL = {
    label: config.model_copy(update={"longer_px": 96} if hasattr(config, "longer_px") else {})
    for label, config in seeded_labellers(1).items()
}
LABELS = ("depth", "normal", "semseg", "det")
pytestmark = pytest.mark.usefixtures("one_thread")
Photo = Callable[..., np.ndarray]


@pytest.fixture
def pictures(photo: Photo) -> list[Picture]:
    sizes = [(64, 64), (40, 90), (130, 50), (40, 90)]
    return [Picture(photo(height, width, seed)) for seed, (height, width) in enumerate(sizes)]


@pytest.mark.parametrize("label", LABELS)
def test_a_network_that_gives_nan_raises(label: str, pictures: list[Picture]) -> None:
    labeller: Any = make_labeller(label, SMALL[label])
    with torch.no_grad():
        for parameter in labeller._network.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NetworkError, match="not finite"):
        labeller.label_pictures(pictures[:2])


def zeroed(network: Any, part: str = "") -> None:
    """Every weight of a network, or of a part of it, is 0."""
    with torch.no_grad():
        for parameter in network.get_submodule(part).parameters():
            parameter.zero_()


BACKBONES = {"depth": "dpt.embeddings", "semseg": "model.pixel_level_module.encoder", "det": "model.backbone"}
BACKBONES["normal"] = BACKBONES["depth"]


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("label", LABELS)
def test_a_network_that_always_says_the_same_raises(label: str, at_once: int, pictures: list[Picture]) -> None:
    labeller: Any = make_labeller(label, SMALL[label])
    zeroed(labeller._network)
    with pytest.raises(NetworkError, match="constant over each of"):
        for start in range(0, 4, at_once):
            labeller.label_pictures(pictures[start : start + at_once])


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("label", LABELS)
def test_a_network_whose_backbone_is_dead_raises(label: str, at_once: int, photo: Photo) -> None:
    """It may still tell borders from the middle, but not one image from another."""
    labeller: Any = make_labeller(label, SMALL[label])
    zeroed(labeller._network, BACKBONES[label])
    pictures = [Picture(photo(64, 64, seed)) for seed in range(4)]
    with pytest.raises(NetworkError, match=r"the same for two different images|constant over each of"):
        for start in range(0, 4, at_once):
            labeller.label_pictures(pictures[start : start + at_once])


@pytest.mark.parametrize("at_once", [1, 2])
def test_normals_that_point_one_way_everywhere_are_constant(at_once: int, pictures: list[Picture]) -> None:
    labeller: Any = make_labeller("normal", SMALL["normal"])
    last = labeller._network.head.head[4]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.2, 0.5, 0.9]))
    with pytest.raises(NetworkError, match="normal from seeded:1 is constant over each of 2 images"):
        for start in range(0, 2, at_once):
            labeller.label_pictures(pictures[start : start + at_once])


LAST = {
    "semseg": ["class_predictor", "model.transformer_module.decoder.mask_predictor.mask_embedder"],
    "det": ["model.decoder.bbox_embed", "model.decoder.class_embed"],
    "depth": ["head"],
    "normal": ["head"],
}


@pytest.mark.parametrize(("label", "part"), [(label, part) for label, parts in LAST.items() for part in parts])
def test_a_network_one_of_whose_heads_is_dead_raises(label: str, part: str, pictures: list[Picture]) -> None:
    """Whatever the others say: classes of all queries, and sizes of all boxes, are never the same."""
    labeller: Any = make_labeller(label, SMALL[label])
    zeroed(labeller._network, part)
    with pytest.raises(NetworkError, match=r"constant over each of 2 images|the same for two different images"):
        labeller.label_pictures(pictures)


@pytest.mark.parametrize("label", LABELS)
def test_the_same_image_again_is_no_sign_of_a_dead_network(label: str, photo: Photo) -> None:
    labeller = make_labeller(label, SMALL[label])
    picture = Picture(photo(64, 64))
    first, again = labeller.label_pictures([picture, Picture(picture.rgb_HWC.copy())])
    first, again = (one.label if isinstance(one, Labelled) else one for one in (first, again))
    assert np.array_equal(first, again) if isinstance(first, np.ndarray) else first == again


def test_an_image_of_one_colour_is_labelled_and_blamed_on_nobody() -> None:
    black = Picture(np.zeros((64, 64, 3), np.uint8))
    for label in LABELS:
        assert not isinstance(make_labeller(label, SMALL[label]).label_pictures([black])[0], Rejected)


def facts(constant: bool, mean: float) -> np.ndarray:
    return np.array([1, constant, 0, 1, mean], np.float32)


def test_one_odd_image_among_others_is_told_from_a_dead_network(photo: Photo) -> None:
    pictures = [Picture(photo(32, 32, seed)) for seed in range(3)]
    rgb = [picture.rgb_HWC for picture in pictures]
    odd = Watch("depth", "weights")
    said = [facts(True, 0.1), facts(False, 0.2), facts(False, 0.3)]
    assert odd.check(pictures, rgb, np.stack(said)) == [True, False, False]
    assert odd.check(pictures[:2], rgb[:2], np.stack(said[:1] * 2)) == [True, True]  # it has shown that it is alive
    dead = Watch("depth", "weights")
    assert dead.check(pictures[:1], rgb[:1], said[0][None]) == [True]
    with pytest.raises(NetworkError, match="constant over each of 2 images"):
        dead.check(pictures[1:2], rgb[1:2], said[0][None])


def test_a_network_that_dies_on_the_way_raises(photo: Photo) -> None:
    pictures = [Picture(photo(32, 32, seed)) for seed in range(8)]
    rgb = [picture.rgb_HWC for picture in pictures]
    watch = Watch("depth", "weights")
    alive = [facts(False, 0.1), facts(False, 0.2)]
    watch.check(pictures[:2], rgb[:2], np.stack(alive))
    dead = np.stack([facts(True, 0.1)] * 8)
    assert watch.check(pictures[:7], rgb[:7], dead[:7]) == [True] * 7
    assert watch.check(pictures[:1], rgb[:1], alive[0][None]) == [False]  # and it counts from the start
    assert watch.check(pictures[:7], rgb[:7], dead[:7]) == [True] * 7
    with pytest.raises(NetworkError, match="constant over each of 8 images"):
        watch.check(pictures[7:], rgb[7:], dead[7:])


def test_a_network_gives_different_images_different_answers(photo: Photo) -> None:
    rgb = [photo(32, 32, seed) for seed in range(2)]
    watch = Watch("depth", "weights")
    watch.check([Picture(rgb[0])], rgb[:1], facts(False, 0.2)[None])
    near = rgb[0] ^ np.uint8(1)  # the same image, stored a little differently
    watch.check([Picture(near)], [near], facts(False, 0.2)[None])
    with pytest.raises(NetworkError, match="the same for two different images"):
        watch.check([Picture(rgb[1])], rgb[1:], facts(False, 0.2)[None])


def test_one_value_of_millions_that_is_no_number_is_found():
    output = torch.zeros(2, 2**24 + 2)
    output[1, 5] = torch.nan
    assert finite_share(output).tolist() == [1, 1 - 2**-24]
    assert finite_share(output[:0]).shape == (0,)
