"""`fourmill doctor`, in this process: what it finds, and what it says is to be done."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
from typer.testing import CliRunner

from fourmill.core.store import LocalStore
from fourmill.pipelines import doctor, doctor_space, preflight
from fourmill.pipelines.cli import app
from fourmill.pipelines.doctor_finding import Finding
from fourmill.pipelines.doctor_pythons import stage_pythons
from fourmill.pipelines.profiles import cc12m_4m7, smallest
from fourmill.pipelines.workspace import Workspace
from fourmill.pseudolabel.config import DptConfig, LabellerConfig, VitDetConfig
from fourmill.pseudolabel.stored import digest_folder
from fourmill.runtime.ray_session import RayConfig, StageShare
from fourmill.tokenize.packed import copies_folder

RUNNER = CliRunner()
GB = 1e9


def test_doctor_says_what_a_project_lacks_and_what_to_do(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out")
    workspace.keep(cc12m_4m7(workspace.out))
    done = RUNNER.invoke(app, ["doctor", "--out", str(workspace.out), "--json"])
    assert done.exit_code == 1
    found = {one["what"]: one for one in json.loads(done.stdout)}
    for label, name in (("depth", "depth"), ("det", "vitdet")):
        assert found[f"labeller of {label}"]["state"] == "missing"
        assert f"fourmill weights add {name} " in found[f"labeller of {label}"]["detail"]
    assert found["torch"]["state"] == found["store"]["state"] == "ok"
    assert (
        found["Python of labels/det"]["state"] != "ok" and "/opt/detectron2" in found["Python of labels/det"]["detail"]
    )
    assert "no list at" in found["source of cc12m"]["detail"]
    assert "GB" in found["free space"]["detail"]


def test_space_is_asked_of_each_disk_for_all_that_is_to_lie_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = 2 * 345 * GB + 375 * GB
    images = 12_400 * GB

    def wanted(store: str) -> dict[Path, int]:
        project = cc12m_4m7(tmp_path).model_copy(update={"store": store, "scratch": str(tmp_path / "scratch")})
        return dict(doctor_space._wanted(project))

    local = wanted(str(tmp_path / "store"))
    assert local == {tmp_path / "store": pytest.approx(images + sets, rel=0.02), tmp_path / "scratch": ANY}
    assert local[tmp_path / "scratch"] == pytest.approx(375 * GB, rel=0.02)
    assert wanted("s3://bucket/prefix") == {
        copies_folder(): pytest.approx(sets, rel=0.02),
        tmp_path / "scratch": local[tmp_path / "scratch"],
    }


@pytest.mark.parametrize(("free", "state"), [(2.1 * GB, "ok"), (1.9 * GB, "missing")])
def test_what_lies_on_one_disk_is_added_up(
    free: float, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [(tmp_path / "not there yet", int(1.5 * GB)), (tmp_path, int(0.5 * GB))]
    monkeypatch.setattr(doctor_space, "_wanted", lambda project: parts)
    monkeypatch.setattr(doctor_space.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    (found,) = doctor_space.space(smallest(tmp_path))
    assert found.state == state and "about 2.0 GB" in found.detail


def test_doctor_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there"
    done = RUNNER.invoke(app, ["doctor", "--out", str(out), "--json"])
    found = {one["what"]: one["state"] for one in json.loads(done.stdout)}
    assert found["store"] == "ok" and list(tmp_path.iterdir()) == []


def test_doctor_reads_stored_weights_and_finds_those_that_are_damaged(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    store = LocalStore(project.store)
    for name, data in (("config.json", b"{}"), ("model.safetensors", b"12345678")):
        store.write(f"made/{name}", data)
    digest = digest_folder(store.path("made"))
    for path in store.list("made"):
        store.copy(path, path.replace("made", f"weights/depth/{digest}"))
    config = DptConfig(weights=f"stored:depth/{digest}")
    project = project.model_copy(update={"labellers": {**project.labellers, "depth": config}})

    def finding() -> Finding:
        return next(one for one in doctor._weights(project) if one.what == "labeller of depth")

    assert finding().state == "ok"
    store.write(f"weights/depth/{digest}/model.safetensors", b"12345679")
    assert finding().state == "missing" and "they are damaged" in finding().detail


def test_doctor_finds_nothing_missing_where_all_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MIN_FREE_DISK_MB", 1)
    monkeypatch.setattr(preflight.check_memory, "__defaults__", (1,))  # of machines too small for the demo
    workspace = Workspace(tmp_path)
    workspace.scenes.mkdir()
    (workspace.scenes / "list.tsv").write_text("http://a.example/1.jpg\ta dog\n")
    workspace.keep(smallest(tmp_path))
    done = RUNNER.invoke(app, ["doctor", "--out", str(tmp_path)], env={"COLUMNS": "200"}, catch_exceptions=False)
    said = done.output
    assert done.exit_code == 0 and "nothing is missing" in said and "missing  " not in said


def findings(
    tmp_path: Path, stages: dict[str, dict[str, Any]], det: LabellerConfig | None = None
) -> dict[str, Finding]:
    """What is said of the stages' Pythons, in a project with these runtime environments by stage."""
    project = smallest(tmp_path)
    ray = RayConfig(stages={name: StageShare(runtime_env=environment) for name, environment in stages.items()})
    labellers = {**project.labellers, **({"det": det} if det else {})}
    found = stage_pythons(project.model_copy(update={"ray": ray, "labellers": labellers}))
    return {finding.what: finding for finding in found}


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_every_stage_with_a_python_of_its_own_has_it_asked(tmp_path: Path) -> None:
    this = {"py_executable": sys.executable}
    found = findings(tmp_path, {"labels": {"py_executable": f"{tmp_path}/gone"}, "labels/depth": this, "tokens": this})
    assert found.keys() == {"Python of labels", "Python of labels/depth, tokens"}
    here, gone = found["Python of labels/depth, tokens"], found["Python of labels"]
    assert here.state == "ok" and f"ray {version('ray')}" in here.detail and "torch" in here.detail
    assert gone.state == "missing" and "no " in gone.detail and "infra/detectron2" in gone.detail
    assert findings(tmp_path, {}) == {}


def test_a_python_that_is_not_fit_is_told_what_to_install(tmp_path: Path) -> None:
    answer = '[{"python": "3.8", "ray": "1.0"}, {"torch": "No module named torch"}]'
    old = findings(tmp_path, {"tokens": {"py_executable": program(tmp_path / "old", f"echo '{answer}'")}})[
        "Python of tokens"
    ]
    assert old.state == "missing" and "is Python 3.8 and must be " in old.detail
    assert f"install ray=={version('ray')}" in old.detail and "cannot import torch (No module" in old.detail
    broken = findings(tmp_path, {"tokens": {"py_executable": program(tmp_path / "broken", "echo bad >&2; exit 3")}})
    assert "does not run (exit code 3: bad)" in broken["Python of tokens"].detail


def test_the_python_of_vitdet_needs_detectron2(tmp_path: Path) -> None:
    vitdet = VitDetConfig(weights="stored:vitdet")
    named = findings(tmp_path, {"labels/det": {"py_executable": sys.executable}}, vitdet)["Python of labels/det"]
    assert named.state == "missing" and "detectron2 is not installed" in named.detail
    assert findings(tmp_path, {}, vitdet)["detectron2"].state == "missing"


def test_an_image_is_asked_where_podman_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Podman is a program here that runs the command in no container."""
    monkeypatch.setenv("PATH", str(tmp_path))
    image = {"tokens": {"image_uri": "somewhere/fourmill:1"}}
    without = findings(tmp_path, image)["image of tokens"]
    assert without.state == "missing" and "podman" in without.detail
    program(tmp_path / "podman", f'[ "$1" = image ] && exit 0; shift 4; exec "{sys.executable}" "$@"')
    there = findings(tmp_path, image)["image of tokens"]
    assert there.state == "ok" and "torch" in there.detail
    program(tmp_path / "podman", "exit 1")
    pulled_later = findings(tmp_path, image)["image of tokens"]
    assert pulled_later.state == "note" and "podman pull somewhere/fourmill:1" in pulled_later.detail


def test_of_a_cluster_nothing_is_known_here(tmp_path: Path) -> None:
    project = cc12m_4m7(tmp_path)
    found = {finding.what: finding for finding in stage_pythons(project)}
    assert "the nodes of the cluster need it" in found["Python of labels/det"].detail


def test_doctor_counts_gpus_that_are_asked_for_and_not_there() -> None:
    import torch

    if torch.cuda.is_available():
        assert doctor._gpu(RayConfig(gpus_per_worker=1.0)).state == "ok"
        return
    assert doctor._gpu(RayConfig()).state == "ok"
    assert doctor._gpu(RayConfig(gpus_per_worker=0.5)).state == "missing"
    assert doctor._gpu(RayConfig(gpus_per_worker=0.5, address="auto")).state == "note"
