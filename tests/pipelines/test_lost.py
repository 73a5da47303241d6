"""Files that are gone from the store, and folders that were moved: noticed by status, mended by the next run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from fourmill.assets.workshop import Workshop
from fourmill.core.shards import ShardPlace, read_rows
from fourmill.core.store import LocalStore
from fourmill.pipelines.definitions import defs
from fourmill.pipelines.lost import lost_files
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.canny import CannyConfig
from fourmill.runtime.manifests import current_manifest
from fourmill.runtime.models import ModelMissingError, current, pointer_path
from fourmill.runtime.project import write_project
from fourmill.runtime.session import Session
from fourmill.runtime.trace import trace_sample

DEPTH = ShardPlace("cc12m", "train", "depth", 0)


@pytest.fixture
def moved(smallest_demo: Path, tmp_path: Path) -> Workspace:
    """The smallest demo in another folder, as if its own were not there any more."""
    shutil.copytree(smallest_demo, tmp_path / "moved", copy_function=shutil.copy2)
    file = tmp_path / "moved" / "project.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"store": str(tmp_path / "before" / "store")}))
    return Workspace(tmp_path / "moved")


@pytest.mark.ray
def test_a_sample_is_traced_through_every_label_of_its_project(smallest_demo: Path) -> None:
    project = Workspace(smallest_demo).project()
    canny = {**project.labellers, "canny": CannyConfig()}
    with_edges = Session(project.model_copy(update={"labellers": canny}))
    row = read_rows(with_edges.store, ShardPlace("cc12m", "train", "images", 0))["key"].to_pylist()[0]
    found = trace_sample(with_edges, row)
    assert {name for name in found if name.startswith("labels/")} == {
        f"labels/{x}" for x in with_edges.project.stored_labels()
    }
    assert "labels/canny" in found


@pytest.mark.ray
def test_nothing_is_lost_of_a_whole_project_wherever_its_folder_is(moved: Workspace) -> None:
    project = moved.project()
    assert project.store == str(moved.out / "store")
    assert lost_files(project, LocalStore(project.store)) == {}


@pytest.mark.ray
def test_a_copy_of_a_folder_has_a_store_of_its_own(smallest_demo: Path, tmp_path: Path) -> None:
    """Else what is made in the copy would replace the original's, which would not notice."""
    copied = Path(shutil.copytree(smallest_demo, tmp_path / "copy", copy_function=shutil.copy2))
    assert Workspace(copied).project().store == str(copied / "store")
    assert Workspace(smallest_demo).project().store == str(smallest_demo / "store")


def test_a_store_elsewhere_stays_where_it_is(tmp_path: Path) -> None:
    """Though the folder has an older one of its own."""
    out, elsewhere = Workspace(tmp_path / "out"), tmp_path / "data"
    for folder in (out.out / "store", elsewhere):
        folder.mkdir(parents=True)
    write_project(smallest(out.out).model_copy(update={"store": str(elsewhere)}), out.project_file)
    assert out.project().store == str(elsewhere)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("folder", "asset"),
    [
        ("images", "cc12m/images"),
        ("depth", "labels/depth"),
        ("_tokens/tok_rgb@64", "tokens/rgb"),
        ("_aligned", "tokens/shards"),
    ],
)
def test_a_receipt_or_a_tar_that_is_gone_is_lost(moved: Workspace, folder: str, asset: str) -> None:
    project, place = moved.project(), ShardPlace("cc12m", "train", folder, 1)
    store = LocalStore(project.store)
    if folder != "_aligned":  # holds no tars
        store.delete(place.tar)
        ((key, block), why) = next(iter(lost_files(project, store).items()))
        assert (key.to_user_string(), block) == (asset, project.layout.block_keys()[0])
        assert why == f"{place.tar} is gone from the store"
    store.delete(place.receipt)
    assert list(lost_files(project, store).values()) == [f"{place.receipt} is gone from the store"]


@pytest.mark.ray
def test_a_model_or_a_manifest_that_nothing_names_any_more_is_lost(moved: Workspace) -> None:
    project, store = moved.project(), LocalStore(moved.project().store)
    _, path = current_manifest(Session(project))
    store.delete(pointer_path("cc12m", "depth"))
    store.write(pointer_path("cc12m", "train_set"), b"{")
    edited = store.read(path).replace(b'"rows": ', b'"rows": 1')
    store.write(path, edited)
    found = {key.to_user_string(): why for (key, _), why in lost_files(project, store).items()}
    assert found == {
        "tokenizers/depth": "cc12m/models/depth.json is gone or damaged",
        "tokenizers/train_set": "cc12m/models/train_set.json is gone or damaged",
        "tokens/manifest": "its file is gone from the store, or is not what its name says",
    }
    with pytest.raises(ModelMissingError, match=r"train_set\.json is damaged: materialize tokenizers/train_set again"):
        current(store, "cc12m", "train_set", "tokenizers/train_set")


@pytest.mark.ray
def test_dagster_loads_a_moved_folder_with_the_store_that_moved_with_it(
    moved: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the UI's runs, schedules and sensors see."""
    monkeypatch.setenv("FOURMILL_PROJECT", str(moved.project_file))
    workshop = (defs().resources or {})["workshop"]
    assert isinstance(workshop, Workshop) and workshop.project == moved.project()


@pytest.mark.ray
def test_the_next_run_makes_what_is_gone_and_only_that(
    moved: Workspace, fourmill: Callable[..., "CompletedProcess[str]"]
) -> None:
    store, out = LocalStore(moved.project().store), str(moved.out)
    before = store.read(DEPTH.tar)
    store.delete(DEPTH.tar)
    store.delete("source/cc12m.json")
    assert "stale" in fourmill("status", "--out", out).stdout
    done = fourmill("run", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert store.read(DEPTH.tar) == before
    states = json.loads(fourmill("status", "--out", out, "--json").stdout)
    assert {row["state"] for row in states} == {"ok"}
