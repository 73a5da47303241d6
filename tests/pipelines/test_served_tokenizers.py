"""A tokenizer from a file in the place of one that is trained: by the command line, into the graph, scored and served."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from fourmill.core.digest import digest_file
from fourmill.core.store import open_store
from fourmill.pipelines import preflight
from fourmill.pipelines.cli import app
from fourmill.pipelines.definitions import build_definitions
from fourmill.pipelines.demo import still_served
from fourmill.pipelines.doctor import examine
from fourmill.pipelines.profiles import cc12m_4m7, demo, smallest
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.models import current
from fourmill.runtime.project import Project, write_project
from fourmill.runtime.tokenizer_weights import with_tokenizer

DIGEST = "a" * 64


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def copy(smallest_demo: Path, tmp_path: Path) -> Workspace:
    """The smallest demo, moved, to be changed."""
    out = tmp_path / "out"
    shutil.copytree(smallest_demo, out)
    text = (out / "project.json").read_text().replace(str(smallest_demo), str(out))
    (out / "project.json").write_text(text)
    return Workspace(out)


def served(project: Project, **digests: str) -> Project:
    return Project.model_validate(project.model_dump() | {"served_tokenizers": digests})


@pytest.mark.ray
def test_an_exported_tokenizer_serves_again_without_training(copy: Workspace, tmp_path: Path) -> None:
    before = copy.project()
    store = open_store(before.store)
    trained = current(store, before.dataset, "semseg", "tokenizers/semseg")
    run("export", "tokenizer_semseg", str(tmp_path / "public"), "--out", str(copy.out))
    for there, holds in ((tmp_path / "public", "another tokenizer"), (tmp_path / "a.txt", "is a file")):
        (tmp_path / "a.txt").touch()
        with pytest.raises(FileExistsError, match=holds):
            run("export", "tokenizer_rgb", str(there), "--out", str(copy.out))
    run("export", "text", str(tmp_path / "words"), "--out", str(copy.out))
    assert current(store, before.dataset, "text", "").digest == digest_file(tmp_path / "words/tokenizer.json")
    assert trained.digest[:12] in run("weights", "list", "--out", str(copy.out))
    said = run(
        "weights", "add", "tokenizer_semseg", str(tmp_path / "public"), "--out", str(copy.out), "--licence", "ours"
    )
    project = copy.project()
    digest = project.served_tokenizers["semseg"]
    assert digest in said and "serves as tokenizers/semseg, without training" in said
    assert project.tokenizers["semseg"].encoder == before.tokenizers["semseg"].encoder
    listed = json.loads(run("weights", "list", "--out", str(copy.out), "--json"))
    (row,) = [row for row in listed if row["name"] == "tokenizer_semseg"]
    assert row["imported"] == [{"digest": digest, "source": "file public", "licence": "ours"}]

    key = dg.AssetKey(["tokenizers", "semseg"])
    job = build_definitions(project).resolve_job_def("train_tokenizers")
    with dg.DagsterInstance.ephemeral() as instance:
        done = job.execute_in_process(asset_selection=[key], instance=instance)
    (made,) = [event.step_materialization_data.materialization for event in done.get_asset_materialization_events()]
    facts: dict[str, Any] = {name: value.value for name, value in made.metadata.items()}
    assert facts["digest"] == digest and facts["licence"] == "ours" and facts["origin"] == "file public"
    assert facts["figure/miou"] == trained.report["figures"]["miou"]
    assert facts["codebook_usage"] == trained.report["usage"] and "baseline/miou" in facts
    serves = current(store, project.dataset, "semseg", "tokenizers/semseg")
    assert serves.digest == digest != trained.digest and "steps" not in serves.report
    assert still_served(copy, smallest(copy.out)).served_tokenizers == {"semseg": digest}


@pytest.mark.ray
def test_a_vocabulary_from_a_file_serves_again(copy: Workspace, tmp_path: Path) -> None:
    before = copy.project()
    store = open_store(before.store)
    fitted = current(store, before.dataset, "text", "tokenizers/text")
    (tmp_path / "text.json").write_bytes(store.read(f"{fitted.path}/tokenizer.json"))
    run("weights", "add", "text", str(tmp_path / "text.json"), "--out", str(copy.out))
    project = copy.project()
    assert project.served_tokenizers == {"text": fitted.digest}
    assert project.text.vocab_size == fitted.report["vocab_size"]
    job = build_definitions(project).resolve_job_def("train_tokenizers")
    with dg.DagsterInstance.ephemeral() as instance:
        job.execute_in_process(asset_selection=[dg.AssetKey(["tokenizers", "text"])], instance=instance)
    serves = current(store, project.dataset, "text", "tokenizers/text")
    assert serves.digest == fitted.digest and serves.report["figures"] == fitted.report["figures"]


def test_the_graph_says_which_tokenizer_is_imported(tmp_path: Path) -> None:
    versions = [
        {s.key.to_user_string(): s.code_version for s in build_definitions(p).resolve_all_asset_specs()}
        for p in (demo(tmp_path), served(demo(tmp_path), rgb=DIGEST))
    ]
    assert {name for name in versions[0] if versions[0][name] != versions[1][name]} == {"tokenizers/rgb"}
    (spec,) = [
        s
        for s in build_definitions(served(demo(tmp_path), rgb=DIGEST)).resolve_all_asset_specs()
        if s.key.to_user_string() == "tokenizers/rgb"
    ]
    assert str(spec.description).startswith("Imported VQ-VAE of rgb") and str(spec.code_version).startswith(
        f"served-{DIGEST[:12]}-"
    )


def test_an_imported_tokenizer_that_is_not_there_is_missed_before_anything_starts(tmp_path: Path) -> None:
    project = served(smallest(tmp_path), rgb=DIGEST, text=DIGEST)
    with pytest.raises(preflight.NotReadyError) as error:
        preflight.check_weights(project)
    for command in (
        f"fourmill weights add tokenizer_rgb hf:EPFL-VILAB/4M_tokenizers_rgb_16k_224-448 --store {project.store}",
        "fourmill weights add text text_tokenizer_4m_wordpiece_30k.json",
    ):
        assert command in str(error.value)
    findings = {finding.what: finding.state for finding in examine(project)}
    assert findings["tokenizer of rgb"] == findings["tokenizer of text"] == "missing"


@pytest.mark.parametrize("digests", [{"rgb": "short"}, {"det": DIGEST}, {"rgb": "A" * 64}])
def test_a_digest_that_is_none_is_refused(tmp_path: Path, digests: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="served_tokenizers"):
        served(demo(tmp_path), **digests)


def test_one_patch_serves_all_tokenizers_of_a_project(tmp_path: Path) -> None:
    project, paper = demo(tmp_path), cc12m_4m7(tmp_path)
    store = open_store(project.store)
    config = {"tokenizer": paper.tokenizers["rgb"].model_dump(mode="json"), "depth_span": [-4, 4]}
    store.write(f"models/tokenizer_rgb/{DIGEST}/config.json", json.dumps(config).encode())
    with pytest.raises(ValidationError, match=r"rgb has patches of 16 pixels, depth of 8: .* one patch"):
        with_tokenizer(project, "tokenizer_rgb", DIGEST)
    fitting = with_tokenizer(paper.model_copy(update={"store": project.store}), "tokenizer_rgb", DIGEST)
    assert fitting.served_tokenizers == {"rgb": DIGEST} and fitting.input_px == 224


def test_a_folder_without_a_project_serves_nothing(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    assert still_served(Workspace(tmp_path), project) == project
    write_project(project, Workspace(tmp_path).project_file)
    assert still_served(Workspace(tmp_path), project) == project
