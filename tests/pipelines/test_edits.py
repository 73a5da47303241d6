"""Edits of project.json outlive commands; commands change what they name."""

import json
from pathlib import Path

import pytest

from fourmill.pipelines.edits import with_edits, with_settings
from fourmill.pipelines.profiles import smallest
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.project import Project, ProjectError


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return smallest(tmp_path)


def test_an_edit_stays_where_the_command_says_what_it_said_before(project: Project) -> None:
    edited = with_settings(project, ["ingest.per_host=3", "samples.num_shown=1"])
    assert with_edits(project, edited, project) == edited
    commanded = with_settings(project, ["ingest.per_host=5"])
    assert with_edits(commanded, edited, project) == with_settings(edited, ["ingest.per_host=5"])
    assert with_edits(project, edited, edited) == project  # nothing was edited, the command says something else


def test_what_is_added_by_hand_stays_and_what_a_command_takes_back_goes(project: Project) -> None:
    more = {"labellers": {**project.labellers, "canny": {"kind": "canny"}}}
    with_canny = Project.model_validate({**project.model_dump(), **more})
    assert with_edits(project, with_canny, project) == with_canny
    assert with_edits(project, with_canny, with_canny) == project
    bounds = Project.model_validate({**project.model_dump(), "tokenizer_bounds": {"rgb": {"min_usage": 0.5}}})
    assert with_edits(bounds, bounds, bounds) == bounds


def test_a_workspace_keeps_edits_over_commands(tmp_path: Path, project: Project) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.keep(project) == project
    values = json.loads(workspace.project_file.read_text())
    values["ingest"]["min_side_px"] = 32
    extra = {"name": "mine", "source": {"list": "/mine.tsv"}, "layout": {"num_blocks": 1}}
    values["more_datasets"] = [{**extra, "ingest": {}}]
    workspace.project_file.write_text(json.dumps(values))
    for _ in range(2):
        kept = workspace.keep(project)
        assert kept == workspace.project()
        assert kept.ingest.min_side_px == 32
        assert [dataset.name for dataset in kept.more_datasets] == ["mine"]


def test_a_folder_serves_one_list_which_may_grow(tmp_path: Path, project: Project) -> None:
    workspace = Workspace(tmp_path)
    workspace.keep(project)
    grown = with_settings(project, ["layout.num_blocks=3"])
    assert workspace.keep(grown) == grown
    for setting in ("layout.num_blocks=2", "layout.rows_per_shard=21", "source.list=/other.tsv"):
        with pytest.raises(ProjectError, match="choose another --out"):
            workspace.keep(with_settings(project, [setting]))


def test_values_are_json_or_text(project: Project) -> None:
    settings = [
        "source.url_column=link",
        "ingest.allow_ports=[80]",
        "second_px=null",
        "second_labels=[]",
        "superres=null",
    ]
    changed = with_settings(project, settings)
    assert (changed.source.url_column, changed.ingest.allow_ports, changed.second_px) == ("link", (80,), None)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("ingest.per_host", "give a key of project.json"),
        ("nowhere.at.all=1", "give a key of project.json"),
        ("ingest.per_hots=4", r"ingest\.per_hots: there is no such key; is ingest\.per_host meant\?"),
        ("ingest.per_host=many", "ingest.per_host: Input should be a valid integer"),
    ],
)
def test_a_setting_that_sets_nothing_says_so(project: Project, setting: str, said: str) -> None:
    with pytest.raises(ProjectError, match=said):
        with_settings(project, [setting])
