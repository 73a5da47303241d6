"""Profiles over other sources: blocks that hold the rows, and labellers in the environments that they need."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fourmill.core.names import Layout
from fourmill.core.store import open_store
from fourmill.ingest.source import build_source_index
from fourmill.pipelines import lists
from fourmill.pipelines.edits import with_settings
from fourmill.pipelines.lists import Choice, list_project, with_grown_list
from fourmill.pipelines.profiles import DETECTRON2_PYTHON, cc12m_4m7, demo, smallest
from fourmill.pseudolabel.config import DetectorConfig, DptConfig, VitDetConfig
from fourmill.runtime.project import Project, ProjectError

SEEDED = Choice(labellers="seeded")


def over(base: Project, rows: int, where: Path) -> Project:
    """The profile with a list of so many rows in place."""
    path = where / "list.tsv"
    path.write_text("".join(f"http://example.org/{row}.jpg\tcaption {row}\n" for row in range(rows)))
    return with_settings(base, [f"source.list={path}"])


@pytest.fixture
def network_folder(tmp_path: Path) -> Callable[[str], Path]:
    """A folder of networks as far as their configs, by the kind of the detector."""

    def make(kind: str) -> Path:
        types = {"depth": "dpt", "normal": "dpt", "semseg": "mask2former", "clip": "clip_vision_model", "det": kind}
        for label, model_type in types.items():
            folder = tmp_path / kind / label
            folder.mkdir(parents=True, exist_ok=True)
            facts = {"model_type": model_type, "patch_size": 16, "projection_dim": 512}
            (folder / "config.json").write_text(json.dumps(facts))
            (folder / "model.safetensors").touch()
        return tmp_path / kind

    return make


def test_a_list_that_grows_gets_more_blocks_and_keeps_those_it_has(tmp_path: Path) -> None:
    before = list_project(over(demo(tmp_path), 1000, tmp_path), SEEDED)
    assert before.layout == Layout(rows_per_shard=500, shards_per_block=2, num_blocks=1)
    same = list_project(over(demo(tmp_path), 999, tmp_path), SEEDED, before)
    assert same == before
    grown = list_project(over(demo(tmp_path), 1001, tmp_path), SEEDED, before)
    assert grown.layout == before.layout.model_copy(update={"num_blocks": 2})
    assert grown.train_set == before.train_set  # frozen: tokenizers are not trained anew for a row


def test_a_kept_project_gets_more_blocks_for_a_list_that_has_grown_and_for_no_other(tmp_path: Path) -> None:
    before = list_project(over(demo(tmp_path), 1000, tmp_path), SEEDED)
    assert with_grown_list(before) == before
    over(demo(tmp_path), 1001, tmp_path)
    grown = with_grown_list(before)
    assert grown == before.model_copy(update={"layout": before.layout.model_copy(update={"num_blocks": 2})})
    over(demo(tmp_path), 10, tmp_path)
    assert with_grown_list(grown) == grown
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        away = with_settings(before, [f"source.list=http://127.0.0.1:{closed.getsockname()[1]}/list.tsv"])
        assert with_grown_list(away) == away


def test_another_list_is_cut_anew(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    before = list_project(over(demo(tmp_path), 1000, tmp_path), SEEDED)
    other = list_project(over(demo(tmp_path), 30, tmp_path / "other"), SEEDED, before)
    assert other.layout == Layout(rows_per_shard=30, shards_per_block=1, num_blocks=1)


def test_all_of_cc12m_is_cut_as_its_profile_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "_rows_of", lambda base: 12_400_000)
    paper = cc12m_4m7(tmp_path)
    assert list_project(paper, SEEDED).layout == paper.layout
    assert list_project(paper, Choice(labellers="seeded", num_blocks=80)).layout.num_blocks == 80
    monkeypatch.setattr(lists, "_rows_of", lambda base: 20_000_000)
    with pytest.raises(ProjectError, match="100 blocks of 200,000, more than 99"):
        list_project(paper, SEEDED)


def test_rows_that_are_numbered_are_not_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = over(smallest(tmp_path), 70, tmp_path)
    build_source_index(open_store(base.store), base.dataset, base.source, base.layout)
    monkeypatch.setattr(lists, "count_rows", lambda source: pytest.fail("the list was read again"))
    assert list_project(base, SEEDED).layout.num_rows >= 70
    monkeypatch.undo()
    assert list_project(over(base, 90, tmp_path), SEEDED).layout.num_rows >= 90


def test_the_paper_s_labellers_run_on_any_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "find_spec", lambda name: None)
    paper = over(cc12m_4m7(tmp_path), 40, tmp_path)
    project = list_project(paper, Choice(num_blocks=5))
    assert project.labellers == paper.labellers
    det = project.ray.for_stage("labels/det")
    assert isinstance(project.labellers["det"], VitDetConfig)
    assert dict(det.runtime_env) == {"py_executable": DETECTRON2_PYTHON}
    assert det.gpus_per_worker == 0.5


def test_folders_of_networks_get_the_profile_s_crops_precision_and_environment(
    tmp_path: Path, network_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "find_spec", lambda name: None)
    for base, grid, precision in ((demo(tmp_path), 8, "fp32"), (cc12m_4m7(tmp_path), 14, "bf16")):
        for kind, expected in (("rt_detr_v2", DetectorConfig), ("vitdet", VitDetConfig)):
            project = list_project(over(base, 40, tmp_path), Choice(labellers=str(network_folder(kind)), num_blocks=5))
            det, depth, clip = (project.labellers[label] for label in ("det", "depth", "clip"))
            assert isinstance(det, expected) and isinstance(depth, DptConfig)
            assert depth.precision == precision == getattr(clip, "precision", None)
            assert getattr(clip, "input_px", 0) == grid * 16
            ray = project.ray.for_stage("labels/det")
            assert dict(ray.runtime_env) == ({"py_executable": DETECTRON2_PYTHON} if kind == "vitdet" else {})
            as_dpt = project.ray.for_stage("labels/depth").gpus_per_worker  # the others leave a GPU room
            assert ray.gpus_per_worker == (0.5 if kind == "vitdet" and grid == 14 else as_dpt)


def test_the_demo_s_labellers_are_no_default_for_a_list(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="give --labellers"):
        list_project(over(demo(tmp_path), 40, tmp_path), Choice())
