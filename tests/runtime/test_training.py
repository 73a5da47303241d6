"""What is fitted is fitted on the data that the project names, and serves if it is good enough."""

import json
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from fourmill.core.ledger import write_ledger
from fourmill.core.names import SPLITS, Layout, sample_key
from fourmill.core.sequences import TextTokenizer
from fourmill.core.shards import Item, Recipe, ShardPlace, write_shard
from fourmill.core.store import Store
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.pipelines.profiles import smallest
from fourmill.runtime import superres, training
from fourmill.runtime.models import ModelMissingError, ModelRef, current, set_current
from fourmill.runtime.project import DatasetConfig, Project
from fourmill.runtime.session import Session
from fourmill.runtime.superres import WAYS, train_superres
from fourmill.runtime.training import BlockNotReadyError, FourmName, fit_text, make_train_set, train_fourm
from fourmill.tokenize.config import TrainSetConfig

LAYOUT = Layout(rows_per_shard=3, shards_per_block=1, num_blocks=2)
ROWS = pa.schema([("caption", pa.string())])


def captioned(store: Store, dataset: str, captions: list[str | None]) -> None:
    """A published block of images with these captions in each split, of which a failed one has its own."""
    for split in SPLITS:
        items = [Item(sample_key(i), ext="jpg", data=b"", extra={"caption": c}) for i, c in enumerate(captions)]
        items.append(Item(sample_key(len(captions)), "http_404", extra={"caption": "a caption of nothing"}))
        place = ShardPlace(dataset, split, "images", 0)
        write_shard(store, place, Recipe(stage="images", code_version="1"), items, "r", ROWS)
    write_ledger(store, dataset, "images", "block_00", range(1), f"{dataset}/images", 1)


def test_the_vocabulary_is_fitted_on_the_data_set_that_the_training_set_is_of(tmp_path: Path) -> None:
    source = SourceConfig(kind="folder", root=str(tmp_path))
    other = DatasetConfig(name="photographs", source=source, layout=LAYOUT, ingest=IngestConfig())
    train_set = TrainSetConfig(num_samples=3, num_eval=1, dataset="photographs", blocks=("block_00",))
    project = smallest(tmp_path).model_copy(update={"more_datasets": (other,), "train_set": train_set})
    session = Session(Project.model_validate(project.model_dump()))
    captioned(session.store, "cc12m", ["scenes of solids"])
    captioned(session.store, "photographs", ["a heron by a lake", None, "two herons"])
    ref = fit_text(session)
    assert ref.report["num_captions"] == 2
    tokenizer = TextTokenizer(session.store.read(f"{ref.path}/tokenizer.json"))
    assert len(tokenizer.encode("heron")) == 2  # one word piece, and the end
    assert json.loads(session.store.read(f"{ref.path}/report.json"))["digest"] == ref.digest


@pytest.mark.parametrize(("dataset", "asset"), [(None, "labels/depth"), ("photographs", "photographs/labels/depth")])
def test_a_block_that_is_not_labelled_is_told_with_its_own_data_sets_asset(
    tmp_path: Path, dataset: str | None, asset: str
) -> None:
    source = SourceConfig(kind="folder", root=str(tmp_path))
    other = DatasetConfig(name="photographs", source=source, layout=LAYOUT, ingest=IngestConfig())
    train_set = TrainSetConfig(num_samples=3, num_eval=1, dataset=dataset, blocks=("block_00",))
    update = {"more_datasets": (other,), "layout": LAYOUT, "train_set": train_set}
    session = Session(Project.model_validate(smallest(tmp_path).model_copy(update=update).model_dump()))
    captioned(session.store, dataset or "cc12m", ["a heron"])
    with pytest.raises(BlockNotReadyError, match=rf": materialize {asset} for block_00 first"):
        make_train_set(session)


def test_a_vocabulary_that_loses_captions_does_not_serve_and_the_one_before_it_does(tmp_path: Path) -> None:
    train_set = TrainSetConfig(num_samples=3, num_eval=1, blocks=("block_00",))
    session = Session(smallest(tmp_path).model_copy(update={"layout": LAYOUT, "train_set": train_set}))
    captioned(session.store, "cc12m", ["[PAD] a heron", "[PAD] a lake"])  # special tokens, which decoding leaves out
    assert fit_text(session).report["figures"]["round_trip_share"] == 0
    with pytest.raises(ModelMissingError, match="materialize tokenizers/text first"):
        current(session.store, "cc12m", "text", "tokenizers/text")
    captioned(session.store, "cc12m", ["a heron by a lake", "two herons"])
    good = fit_text(session)
    captioned(session.store, "cc12m", ["[PAD] a heron", "[PAD] a lake"])
    assert fit_text(session).digest != good.digest
    assert current(session.store, "cc12m", "text", "tokenizers/text") == good


@pytest.mark.parametrize("last", [1.2, float("nan")])
@pytest.mark.parametrize("name", get_args(FourmName))
def test_4m_whose_loss_does_not_hold_does_not_serve_and_the_one_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: FourmName, last: float
) -> None:
    session = Session(smallest(tmp_path))
    for one in get_args(FourmName):
        set_current(session.store, "cc12m", ModelRef(name=one, digest="before", path=f"models/{one}/before"))
    monkeypatch.setattr(training, "current_manifest", lambda session: (None, "cc12m/manifests/0.json"))

    def trained(loss: float) -> ModelRef:
        curve = {"loss_curve": [[1, 1.0], [2, loss]], "figures": {}, "baseline": {}}
        session.store.write("report.json", json.dumps({"digest": f"loss {loss}", "path": "models/x", **curve}).encode())
        return train_superres(session) if name == "superres" else train_fourm(session, name)

    def score(work: Any, session: Session) -> Any:
        (scored,) = work.args
        assert scored.digest.startswith("loss"), "another model is scored than the one that was trained"
        way = dict.fromkeys(WAYS, 20.0)
        return {"psnr_db": way, "psnr_to_tokenizer_db": way}, 4

    monkeypatch.setattr(training, "run_program", lambda *given: "report.json")
    monkeypatch.setattr(superres, "run_warm", score)
    assert trained(last).digest == f"loss {last}"
    assert current(session.store, "cc12m", name, "").digest == "before"
    assert trained(0.9) == current(session.store, "cc12m", name, "")
