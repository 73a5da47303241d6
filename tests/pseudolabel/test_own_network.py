"""A label of its own that a network makes: its weights are added, named, looked for and loaded as those of 4M's labels."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save_file

from fourmill.core.labels import Picture
from fourmill.core.names import Layout
from fourmill.core.safe_load import read_weights
from fourmill.core.shards import Receipt
from fourmill.core.store import Store
from fourmill.pseudolabel import canny, members
from fourmill.pseudolabel.checks import check_block
from fourmill.pseudolabel.config import LabellerConfig, weights_digest
from fourmill.pseudolabel.convert import add_weights
from fourmill.pseudolabel.format import OwnLabel, OwnNetworkConfig, OwnWeights
from fourmill.pseudolabel.labeller import Answer, NetworkError
from fourmill.pseudolabel.make import make_labeller
from fourmill.pseudolabel.named_weights import at_hand, pinned, require_weights, verify_weights
from fourmill.pseudolabel.stored import Origin, Weights, WeightsMissingError

pytestmark = pytest.mark.usefixtures("one_thread")


class OutlineConfig(OwnNetworkConfig):
    kind: str = Field(default="outline", pattern="^outline$")
    model_types = ("outline",)

    weights: Weights = "stored:outline"


class OutlineLabeller:
    """Where one convolution of the image is above nought."""

    label = "outline"

    def __init__(self, config: OutlineConfig) -> None:
        self.batch_size, self.weights_digest = config.batch_size, config.weights_digest
        self._kernel = load_file(Path(config.weights) / "model.safetensors")["kernel"]

    def bucket(self, picture: Picture) -> tuple[int, int]:
        return (0, 0)

    def label_pictures(self, pictures: Sequence[Picture]) -> Sequence[Answer]:
        return [self._outline(torch.from_numpy(np.array(picture.rgb_HWC))) for picture in pictures]

    def _outline(self, rgb_HWC: torch.Tensor) -> np.ndarray:
        found_1HW = torch.nn.functional.conv2d(rgb_HWC.permute(2, 0, 1)[None].float(), self._kernel, padding=1)[0]
        return (found_1HW[0] > 0).numpy().astype(np.uint8) * np.uint8(255)


def convert(source: Path, target: Path) -> None:
    state = read_weights(source)
    if state.keys() != {"kernel"}:
        raise NetworkError(f"{source} holds {sorted(state)}, expected a kernel")
    save_file(state, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({"model_type": "outline"}))


ORIGIN = Origin("outline", "outline", "outline.pth", "a kernel", "ours", "https://a.example/outline.pth")
LABEL = OwnLabel(
    version="1",
    format=replace(canny.LABEL.format, folder="outline"),
    config=OutlineConfig,
    make=OutlineLabeller,
    weights=OwnWeights(ORIGIN, convert),
)


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one entry; the table of formats has been made from it when the project is loaded."""
    monkeypatch.setitem(members.OWN, "outline", LABEL)  # type: ignore[arg-type]
    monkeypatch.setitem(members.FORMATS, "outline", LABEL.format)  # type: ignore[arg-type]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The weights as their authors give them away."""
    torch.save({"kernel": torch.randn(1, 3, 3, 3, generator=torch.Generator().manual_seed(0))}, tmp_path / "o.pth")
    return tmp_path / "o.pth"


def test_a_block_is_labelled_with_weights_by_their_digest(
    published: Path,
    store: Store,
    layout: Layout,
    fill: Callable[..., None],
    jpeg: Callable[..., bytes],
    photo: Callable[..., np.ndarray],
    label_block: Callable[..., list[Receipt]],
) -> None:
    added = add_weights(store, "outline", published, "the authors", "ours")
    config = pinned(OutlineConfig(), store)
    assert isinstance(config, OutlineConfig) and config.weights == f"stored:outline/{added.digest}"
    assert TypeAdapter(LabellerConfig).validate_json(config.model_dump_json()) == config
    require_weights("outline", config, store)
    fill("block_00", {row: jpeg(photo(20, 30, row)) for row in (0, 1, 2, 11)})
    receipts = label_block("outline", config)
    assert {receipt.recipe.weights for receipt in receipts} == {added.digest}
    report = check_block(store, "tiny", layout, "block_00", "outline")
    assert report.passed, report.problems
    assert "a kernel; licence: ours" in store.read(f"weights/outline/{added.digest}/card.md").decode()


def test_weights_that_are_not_there_stop_the_work_with_the_command_that_mends_it(published: Path, store: Store) -> None:
    command = "`curl -fLO https://a.example/outline.pth && fourmill weights add outline outline.pth --store "
    with pytest.raises(WeightsMissingError, match=f"outline labeller: .*{command}"):
        require_weights("outline", OutlineConfig(), store)
    config = OutlineConfig(weights=f"stored:outline/{add_weights(store, 'outline', published, 'here').digest}")
    verify_weights(config, store)
    with pytest.raises(ValueError, match="outline labeller does not make depth"):
        require_weights("depth", config, store)
    store.write(f"{config.weights.replace('stored:', 'weights/')}/model.safetensors", b"other")
    with pytest.raises(WeightsMissingError, match="they are damaged"):
        make_labeller("outline", config, store)


def test_a_folder_serves_too_and_another_networks_does_not(published: Path, store: Store, tmp_path: Path) -> None:
    added = add_weights(store, "outline", published, "here")
    local: Any = at_hand(OutlineConfig(weights=f"stored:outline/{added.digest}"), store)
    assert weights_digest(local) == added.digest == make_labeller("outline", local).weights_digest
    (tmp_path / "config.json").write_text('{"model_type": "dpt"}')
    with pytest.raises(WeightsMissingError, match="outline labeller: a network of model_type 'dpt'"):
        require_weights("outline", OutlineConfig(weights=str(tmp_path)))


def test_what_are_no_such_weights_are_not_added(store: Store, tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(1)}, tmp_path / "o.pth")
    with pytest.raises(NetworkError, match=r"holds \['other'\], expected a kernel"):
        add_weights(store, "outline", tmp_path / "o.pth", "here")
    assert store.list("weights") == []
