"""`tokens/*` as Dagster runs them: checks that fail are told on the page, and what they say to do mends the block."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fourmill.assets import result as asset_result
from fourmill.assets.tokens import token_assets
from fourmill.assets.workshop import Workshop
from fourmill.core.ledger import ledger_path, write_ledger
from fourmill.core.modality import Modality
from fourmill.core.names import SPLITS, Layout, SampleKey, sample_key
from fourmill.core.shards import Item, Receipt, Recipe, ShardPlace, need, read_receipt, write_shard
from fourmill.core.store import LocalStore
from fourmill.core.work import ShardJob
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.models import ModelRef, set_current
from fourmill.runtime.project import Project
from fourmill.runtime.workers import token_modalities
from fourmill.tokenize.align import AlignWorker, align_recipe, public_folders, token_folder

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy, as `build_definitions` does

LAYOUT = Layout(rows_per_shard=6, shards_per_block=2, num_blocks=1)
SIZES = pa.schema([("width", pa.int32()), ("height", pa.int32())])
LACKING = sample_key(8)  # a sample of the training split that has no caption
Materialize = Callable[[str], dg.ExecuteInProcessResult]
Put = Callable[[str, Callable[[SampleKey], Item]], None]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return smallest(tmp_path).model_copy(update={"layout": LAYOUT})


@pytest.fixture
def store(project: Project) -> LocalStore:
    return LocalStore(project.store)


@pytest.fixture
def put(store: LocalStore, project: Project) -> Put:
    """Writes a folder of the block, and its ledger; every fifth row is held out."""

    def write(folder: str, item: Callable[[SampleKey], Item]) -> None:
        for shard in LAYOUT.shards_of("block_00"):
            for split in SPLITS:
                keys = [sample_key(row) for row in LAYOUT.rows_of(shard) if (row % 5 == 0) == (split == "val")]
                place = ShardPlace(project.dataset, split, folder, shard)
                extra = SIZES if folder == "images" else None
                write_shard(store, place, Recipe(stage=folder, code_version="1"), map(item, keys), "run", extra)
        write_ledger(store, project.dataset, folder, "block_00", LAYOUT.shards_of("block_00"), folder, 4)

    return write


@pytest.fixture
def materialize(project: Project, shards_here: object) -> Iterator[Materialize]:
    instance = dg.DagsterInstance.ephemeral()

    def run(name: str) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            token_assets(project, dg.StaticPartitionsDefinition(LAYOUT.block_keys())),
            selection=[dg.AssetKey(["tokens", name])],
            partition_key="block_00",
            resources={"workshop": Workshop(project)},
            instance=instance,
            raise_on_error=False,
        )

    yield run
    instance.dispose()


def npy(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def image(key: SampleKey) -> Item:
    sink = io.BytesIO()
    Image.new("RGB", (80, 72), (int(key), 50, 100)).save(sink, "JPEG")
    return Item(key, ext="jpg", data=sink.getvalue(), extra={"width": 80, "height": 72})


def check(result: dg.ExecuteInProcessResult) -> tuple[bool, str]:
    """Whether the only check has passed, and the problems it tells."""
    (found,) = result.get_asset_check_evaluations()
    problems = found.metadata["problems"]
    rows = problems.records if isinstance(problems, dg.TableMetadataValue) else []
    return found.passed, "\n".join(str(row.data["problem"]) for row in rows)


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, dg.MetadataValue]:
    (event,) = result.get_asset_materialization_events()
    return dict(event.materialization.metadata)


@pytest.mark.parametrize(("value", "length", "problem"), [
    (0, 64, ""),
    (31, 64, ""),
    (32, 64, "ids 32..32, expected 0..31"),
    (-1, 64, "ids -1..-1, expected 0..31"),
    (0, 60, "int16 (1, 60), expected int16 (1, 64)"),
])  # fmt: skip
def test_tokens_out_of_range_are_told_and_their_block_is_stopped(
    store: LocalStore, project: Project, put: Put, materialize: Materialize, monkeypatch: pytest.MonkeyPatch,
    value: int, length: int, problem: str,
) -> None:  # fmt: skip
    folder = token_folder("tok_rgb@64")
    put("images", image)
    put(folder, lambda key: Item(key, ext="npy", data=npy(np.full((1, length), value, np.int16))))
    set_current(store, project.dataset, ModelRef(name="rgb", digest="0", path="models/rgb/0"))
    monkeypatch.setattr(asset_result, "run_block", lambda session, stage, block: 0)
    result = materialize("rgb")
    passed, problems = check(result)
    assert passed == result.success == (not problem) and problem in problems
    assert ("preview" in metadata(result)) == ("ids_seen" in metadata(result)) == (not problem)
    assert store.exists(ledger_path(project.dataset, "train", folder, "block_00")) == (not problem)


def member(modality: Modality, key: SampleKey) -> Item:
    if modality.ext == "npy":
        return Item(key, ext="npy", data=npy(np.full((1, modality.max_tokens), int(key), np.int16)))
    if modality.name == "caption" and key == LACKING:
        return Item(key, "bad_label", "does not encode")
    return Item(key, ext=modality.ext, data=b"a word" if modality.ext == "txt" else b"[]")


@pytest.fixture
def aligned(project: Project, put: Put, materialize: Materialize) -> None:
    """The block's tars in the public folders: linked in its first shard, written again in the second for `LACKING`'s sake."""
    put("images", image)
    for name in token_modalities(project):
        put(token_folder(name), lambda key, name=name: member(project.modalities()[name], key))
    assert check(materialize("shards")) == (True, "")


def receipts(store: LocalStore, project: Project) -> dict[str, Receipt]:
    """Of all public folders, by path."""
    folders = [*public_folders(token_modalities(project)), "_aligned"]
    places = [ShardPlace(project.dataset, s, f, i) for s in SPLITS for f in folders for i in (0, 1)]
    return {place.receipt: need(store, place, "tokens/shards") for place in places}


def damage(store: LocalStore, place: ShardPlace) -> None:
    """Under this name only, whatever it is linked to."""
    file = store.path(place.tar)
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:600] + b"?" + data[601:])


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("folder", ["rgb", "caption", "tok_depth@64", "crop_settings"])
@pytest.mark.usefixtures("aligned")
def test_a_damaged_aligned_tar_is_made_again_once_its_receipt_is_deleted(
    store: LocalStore, project: Project, materialize: Materialize, folder: str, shard: int
) -> None:
    before = receipts(store, project)
    place = ShardPlace(project.dataset, "train", folder, shard)
    damage(store, place)
    passed, problems = check(materialize("shards"))
    assert not passed and f"{place.tar} does not have the digest its receipt names; delete its receipt" in problems
    store.delete(place.receipt)
    result = materialize("shards")
    assert check(result) == (True, "") and metadata(result)["shards_made"].value == 1
    after = receipts(store, project)
    assert {path: one.content for path, one in after.items()} == {path: one.content for path, one in before.items()}
    again = [path for path, one in after.items() if one.run_id != before[path].run_id]
    assert again == [path for path in after if "/train/" in path and f"shard-{shard:05d}" in path]
    assert metadata(materialize("shards"))["shards_made"].value == 0


@pytest.mark.usefixtures("aligned")
def test_an_aligned_tar_that_is_gone_is_made_again(
    store: LocalStore, project: Project, materialize: Materialize
) -> None:
    place = ShardPlace(project.dataset, "val", "rgb", 1)
    store.delete(place.tar)
    result = materialize("shards")
    assert check(result) == (True, "") and metadata(result)["shards_made"].value == 1 and store.exists(place.tar)


@pytest.mark.usefixtures("aligned")
def test_a_kill_while_a_tar_is_linked_leaves_no_old_receipt_beside_a_new_tar(
    store: LocalStore, project: Project, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ShardPlace(project.dataset, "val", "rgb", 0)
    old = store.read(place.tar)
    put("images", lambda key: Item(key, ext="jpg", data=b"other", extra={"width": 80, "height": 72}))
    copy = LocalStore.copy

    def killed(self: LocalStore, source: str, target: str) -> None:
        copy(self, source, target)
        if target == place.tar:
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalStore, "copy", killed)
    modalities = token_modalities(project)
    recipe = align_recipe(store, project.dataset, "val", 0, modalities, project.input_px)
    with pytest.raises(KeyboardInterrupt):
        AlignWorker(store.root, project.dataset, modalities, project.input_px).run(ShardJob("val", 0, recipe, "run"))
    assert store.read(place.tar) != old and read_receipt(store, place) is None
