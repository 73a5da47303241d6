"""`fourmill weights` and `fourmill doctor`, in this process: what they change, what they say, how they end."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fourmill.core.store import open_store
from fourmill.pipelines import doctor, preflight
from fourmill.pipelines.cli import app
from fourmill.pipelines.profiles import cc12m_4m7, demo, smallest
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.config import weights_digest
from fourmill.pseudolabel.stored import ORIGINS, WeightsMissingError, read_pointer
from fourmill.runtime.project import Project
from fourmill.runtime.ray_session import RayConfig
from fourmill.tokenize.released import RELEASED

RUNNER = CliRunner()


@pytest.fixture(scope="session")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny seeded DPT as a Hugging Face folder; do not change it."""
    from fourmill.pseudolabel.choices import seeded_labellers
    from fourmill.pseudolabel.make import make_labeller

    folder = tmp_path_factory.mktemp("depth")
    labeller: Any = make_labeller("depth", seeded_labellers(1)["depth"])
    labeller._network.save_pretrained(folder)
    return folder


@pytest.fixture
def paper(tmp_path: Path) -> Workspace:
    """A project of the paper's networks, made before their weights were there."""
    workspace = Workspace(tmp_path / "out")
    workspace.keep(cc12m_4m7(workspace.out))
    return workspace


def run(*arguments: str) -> str:
    done = RUNNER.invoke(app, [*arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_adding_weights_to_a_project_changes_the_labels_that_they_make_and_no_others(
    paper: Workspace, depth_folder: Path
) -> None:
    before = paper.project()
    said = run("weights", "add", "depth", str(depth_folder), "--out", str(paper.out), "--licence", "ours")
    after = paper.project()
    known = read_pointer(open_store(after.store), "depth")
    assert known is not None and known.licence == "ours" and known.digest in said
    assert weights_digest(after.labellers["depth"]) == known.digest
    changed = [
        label
        for label in after.labellers
        if weights_digest(after.labellers[label]) != weights_digest(before.labellers[label])
    ]
    assert changed == ["depth"] and "depth now made with them" in said


def test_weights_that_no_label_is_made_with_come_with_what_to_write_for_that(
    tmp_path: Path, depth_folder: Path
) -> None:
    workspace = Workspace(tmp_path / "out")
    workspace.keep(demo(workspace.out))
    said = run("weights", "add", "depth", str(depth_folder), "--out", str(workspace.out)).replace("\n", "")
    labellers = json.loads(said[said.index("{") : said.rindex("}") + 1])
    project = workspace.project().model_dump(mode="json")
    workspace.keep(Project.model_validate({**project, "labellers": project["labellers"] | labellers}))
    again = run("weights", "add", "depth", str(depth_folder), "--out", str(workspace.out))
    assert "depth now made with them" in again


def test_the_list_says_what_serves_and_where_it_is_from(tmp_path: Path, depth_folder: Path) -> None:
    store = str(tmp_path / "store")
    run("weights", "add", "depth", str(depth_folder), "--store", store)
    rows = {row["name"]: row for row in json.loads(run("weights", "list", "--store", store, "--json"))}
    assert rows.keys() == ORIGINS.keys() | RELEASED.keys() and rows["tokenizer_rgb"]["imported"] == []
    assert rows["depth"]["stored"] == [rows["depth"]["serves"]["digest"]]
    assert rows["depth"]["serves"]["licence"] == "not stated" and rows["clip"]["stored"] == []
    assert "none yet" in run("weights", "list", "--store", store)


def test_a_project_can_pin_weights_that_were_added_after_it(paper: Workspace, depth_folder: Path) -> None:
    run("weights", "add", "depth", str(depth_folder), "--store", paper.project().store)
    assert "depth pinned" in run("weights", "pin", "--out", str(paper.out))
    assert "nothing pinned" in run("weights", "pin", "--out", str(paper.out))


def test_the_help_names_every_network_its_public_weights_and_examples() -> None:
    said = run("weights", "--help")
    assert all(name in said and origin.source in said for name, origin in {**ORIGINS, **RELEASED}.items())
    assert "fourmill weights add depth omnidata_dpt_depth_v2.ckpt --out" in said


@pytest.mark.parametrize("place", [[], ["--out", "a", "--store", "b"]])
def test_the_place_has_to_be_said_once(place: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either --out FOLDER of a project, or --store ROOT"):
        run("weights", "add", "depth", str(tmp_path), *place)


def test_a_name_that_is_none_is_refused_before_anything_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights are called 'lamp'; names are depth, normal"):
        run("weights", "add", "lamp", "hf:people/lamp", "--store", str(tmp_path))


def test_a_run_without_its_weights_ends_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    place = ("--list", str(tmp_path / "list.tsv"), "--out", str(tmp_path / "out"), "--labellers", "stored")
    with pytest.raises(WeightsMissingError, match=rf"`fourmill weights add depth hf:\S+ --store {tmp_path}/out/store`"):
        run("run", *place)
    assert not (tmp_path / "out").exists()


def test_preflight_names_every_labeller_without_weights(paper: Workspace) -> None:
    with pytest.raises(preflight.NotReadyError) as caught:
        preflight.check_weights(paper.project())
    assert [line.split(" labeller: ")[0] for line in str(caught.value).splitlines()] == [
        "depth",
        "normal",
        "semseg",
        "det",
        "clip",
    ]


def test_doctor_says_what_a_project_lacks_and_what_to_do(paper: Workspace) -> None:
    done = RUNNER.invoke(app, ["doctor", "--out", str(paper.out), "--json"])
    assert done.exit_code == 1
    found = {one["what"]: one for one in json.loads(done.output)}
    for label, name in (("depth", "depth"), ("det", "vitdet")):
        assert found[f"labeller of {label}"]["state"] == "missing"
        assert f"fourmill weights add {name} " in found[f"labeller of {label}"]["detail"]
    assert found["torch"]["state"] == found["store"]["state"] == "ok"
    assert found["detectron2"]["state"] != "ok" and "/opt/detectron2/bin/python" in found["detectron2"]["detail"]
    assert "no list at" in found["source of cc12m"]["detail"]
    assert "GB" in found["free space"]["detail"]


def test_doctor_finds_nothing_missing_where_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MIN_FREE_DISK_MB", 1)
    monkeypatch.setattr(preflight.check_memory, "__defaults__", (1,))  # of machines too small for the demo
    workspace = Workspace(tmp_path)
    workspace.scenes.mkdir()
    (workspace.scenes / "list.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    workspace.keep(smallest(tmp_path))
    said = run("doctor", "--out", str(tmp_path))
    assert "nothing is missing" in said and "missing  " not in said


def test_doctor_asks_the_python_that_is_to_have_detectron2(tmp_path: Path) -> None:
    here = doctor._detectron2(RayConfig(runtime_env={"py_executable": sys.executable}))
    assert here.state == "missing" and "detectron2 is not installed" in here.detail
    gone = doctor._detectron2(RayConfig(runtime_env={"py_executable": str(tmp_path / "python")}))
    assert gone.state == "missing" and "infra/detectron2" in gone.detail
    image = doctor._detectron2(RayConfig(runtime_env={"image_uri": "somewhere/detectron2:1"}))
    assert image.state == "note"
    assert doctor._detectron2(RayConfig()).state == "missing"


def test_doctor_counts_gpus_that_are_asked_for_and_not_there() -> None:
    import torch

    if torch.cuda.is_available():
        assert doctor._gpu(RayConfig(gpus_per_worker=1.0)).state == "ok"
        return
    assert doctor._gpu(RayConfig()).state == "ok"
    assert doctor._gpu(RayConfig(gpus_per_worker=0.5)).state == "missing"
    assert doctor._gpu(RayConfig(gpus_per_worker=0.5, address="auto")).state == "note"
