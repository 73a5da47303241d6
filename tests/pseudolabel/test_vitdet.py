"""What of ViTDet can be known without detectron2: its keys and shapes, its boxes, and what to do where it is missing."""

import json
import pickle
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourmill.core.labels import Box, Picture
from fourmill.core.safe_load import read_weights
from fourmill.core.store import Store
from fourmill.pseudolabel import vitdet
from fourmill.pseudolabel.config import VitDetConfig
from fourmill.pseudolabel.convert import add_weights
from fourmill.pseudolabel.labeller import NetworkError
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.named_weights import at_hand, require_weights
from fourmill.pseudolabel.stored import WeightsMissingError
from fourmill.pseudolabel.vitdet_keys import VitDetArchitecture, vitdet_shapes
from fourmill.pseudolabel.watch import Watch

TINY = VitDetArchitecture(
    image_px=128, embed_dim=32, depth=4, num_heads=2, window_size=4, global_blocks=(1, 3), channels=16, box_dim=24
)


@pytest.fixture
def original(tmp_path: Path) -> Callable[..., Path]:
    """detectron2's layout: numpy arrays under `model`, the mask head among them."""

    def write(change: Callable[[dict[str, Any]], None] = lambda state: None) -> Path:
        rng = np.random.default_rng(0)
        state: dict[str, Any] = {
            key: rng.normal(size=shape).astype(np.float32) * 0.1 for key, shape in vitdet_shapes(TINY).items()
        }
        state["roi_heads.mask_head.predictor.weight"] = np.zeros((80, 16, 1, 1), np.float32)
        change(state)
        path = tmp_path / "model_final.pkl"
        path.write_bytes(pickle.dumps({"model": state, "__author__": "someone"}, protocol=2))
        return path

    return write


def test_the_papers_network_has_as_many_keys_and_parameters_as_detectron2s() -> None:
    """Counts of the network that detectron2 (commit 02b5c4e2) builds from its own configuration, without its mask head."""
    shapes = vitdet_shapes(VitDetArchitecture())
    assert len(shapes) == 545
    assert sum(prod(shape) for shape in shapes.values()) == 688_824_654
    assert shapes["backbone.net.blocks.6.attn.rel_pos_h"] == (27, 80)
    assert shapes["backbone.net.blocks.7.attn.rel_pos_h"] == (127, 80)
    assert shapes["roi_heads.box_predictor.2.cls_score.weight"] == (81, 1024)


def test_a_detectron2_file_becomes_safetensors_without_its_mask_head(
    original: Callable[..., Path], store: Store
) -> None:
    added = add_weights(store, "vitdet", original(), "model_final.pkl", "Apache-2.0", TINY)
    folder = f"weights/vitdet/{added.digest}"
    assert json.loads(store.read(f"{folder}/config.json"))["model_type"] == "vitdet"
    config = VitDetConfig(weights=f"stored:vitdet/{added.digest}")
    require_weights("det", config, store)
    local = Path(at_hand(config, store).weights)
    assert vitdet.read_architecture(local) == TINY
    found = read_weights(local / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in found.items()} == vitdet_shapes(TINY)
    again = add_weights(store, "vitdet", local, "a folder made before")
    assert again.digest == added.digest


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: s.pop("backbone.net.blocks.3.attn.rel_pos_w"),
            r"blocks\.3\.attn\.rel_pos_w: missing, expected \(15, 16\)",
        ),
        (lambda s: s.update(other=np.zeros(2)), "other: unknown"),
        (
            lambda s: s.update({"backbone.net.pos_embed": np.zeros((1, 65, 32), np.float32)}),
            r"pos_embed: shape \(1, 65, 32\), expected \(1, 197, 32\)",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_named(
    spoil: Callable[[dict[str, Any]], None], message: str, original: Callable[..., Path], store: Store
) -> None:
    with pytest.raises(NetworkError, match=rf"model_final\.pkl does not fit ViTDet.*{message}"):
        add_weights(store, "vitdet", original(spoil), "here", None, TINY)
    assert store.list("weights") == []


def test_numbers_that_are_none_are_found_when_weights_are_added(original: Callable[..., Path], store: Store) -> None:
    bias = "roi_heads.box_predictor.1.cls_score.bias"
    path = original(lambda state: state.update({bias: np.full_like(state[bias], np.nan)}))
    with pytest.raises(NetworkError, match=rf"model_final\.pkl holds NaN in {bias}: "):
        add_weights(store, "vitdet", path, "here", None, TINY)
    assert store.list("weights") == []


def test_without_detectron2_the_labeller_says_where_it_is_to_be(original: Callable[..., Path], store: Store) -> None:
    added = add_weights(store, "vitdet", original(), "here", None, TINY)
    with pytest.raises(vitdet.Detectron2MissingError, match=r"infra/detectron2.*runtime_env.*or choose a detector"):
        make_labeller("det", VitDetConfig(weights=f"stored:vitdet/{added.digest}"), store)


def test_a_folder_of_another_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for facts, said in (
        ('{"model_type": "d_fine"}', "model_type 'd_fine'"),
        ('{"model_type": "vitdet", "depth": 0}', "is not ViTDet's"),
    ):
        (tmp_path / "config.json").write_text(facts)
        with pytest.raises(WeightsMissingError, match=said):
            make_labeller("det", VitDetConfig(weights=str(tmp_path)))
    with pytest.raises(WeightsMissingError, match="no seeded vitdet"):
        require_weights("det", VitDetConfig(weights="seeded:0"))


class AlwaysTheSame(vitdet.VitDetLabeller):
    """A network that is alive, to judge by one image, and says the same of every other."""

    def __init__(self) -> None:
        self.batch_size = 2
        self._architecture, self._device = TINY, torch.device("cpu")
        self._watch = Watch("features", "weights")

    def _predict(self, pictures: Sequence[Picture]) -> tuple[list[Any], np.ndarray]:
        return [None] * len(pictures), np.array([[1, 0, -1, 1, 0.25]] * len(pictures), np.float32)

    def _boxes(self, instances: Any) -> list[Box]:
        return []


def test_the_same_answer_to_images_of_different_sizes_is_a_dead_network(photo: Callable[..., np.ndarray]) -> None:
    labeller, first = AlwaysTheSame(), Picture(photo(60, 80))
    assert labeller.label_pictures([first, first]) == [[], []]
    with pytest.raises(NetworkError, match="the same for two different images"):
        labeller.label_pictures([Picture(photo(50, 90, 1))])


def test_boxes_are_clipped_sorted_cut_at_the_threshold_and_never_empty() -> None:
    rows = [
        (0.59999, 0, 0.1, 0.1, 0.2, 0.2),
        (0.6, 1, -0.25, 0.5, 0.5, 1.5),
        (0.9, 79, 0.25, 0.25, 0.75, 0.5),
        (0.95, 2, 0.5, 0.5, 0.5, 0.9),
    ]
    found = vitdet.to_boxes(rows, 0.6)
    assert [(box.class_name, box.score) for box in found] == [("toothbrush", 0.9), ("bicycle", 0.6)]
    assert (found[1].xmin, found[1].ymin, found[1].xmax, found[1].ymax) == (0.0, 0.5, 0.5, 1.0)
