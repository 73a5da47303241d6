"""What is fitted is fitted on the data that the project names."""

import json
from pathlib import Path

import pyarrow as pa

from fourmill.core.ledger import write_ledger
from fourmill.core.names import SPLITS, Layout, sample_key
from fourmill.core.sequences import TextTokenizer
from fourmill.core.shards import Item, Recipe, ShardPlace, write_shard
from fourmill.core.store import Store
from fourmill.ingest.config import IngestConfig, SourceConfig
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.project import DatasetConfig, Project
from fourmill.runtime.session import Session
from fourmill.runtime.training import fit_text
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
