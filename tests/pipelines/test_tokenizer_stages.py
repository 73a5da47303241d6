"""Stages of tokenizers' trainings in a project: their training sets, other data sets' labels, bounds."""

import re
from pathlib import Path

import dagster as dg
import pytest
from pydantic import ValidationError

from fourmill.pipelines import runner
from fourmill.pipelines.definitions import build_definitions, build_jobs
from fourmill.pipelines.edits import with_settings
from fourmill.pipelines.profiles import cc12m_4m7, demo
from fourmill.runtime.models import ModelRef
from fourmill.runtime.project import Project
from fourmill.runtime.training import is_good_enough
from fourmill.tokenize.bounds import TokenizerBounds
from fourmill.tokenize.config import TrainSetConfig


def staged(project: Project, **train_set: object) -> Project:
    """The project with one more data set, whose packed samples the first of rgb's two stages sees."""
    values = project.model_dump(mode="json")
    other = {key: values[key] for key in ("source", "layout", "ingest")} | {"name": "imagenet"}
    config = TrainSetConfig.model_validate({"num_samples": 9, "num_eval": 3, "dataset": "imagenet", **train_set})
    rgb = values["tokenizers"]["rgb"]
    rgb["earlier_stages"] = [rgb["training"] | {"name": "first", "train_set": "first"}]
    more = {"more_datasets": [other], "more_train_sets": {"first": config.model_dump(mode="json")}}
    return Project.model_validate({**values, **more})


def test_a_stages_training_set_and_its_labels_are_upstream_of_the_tokenizer(tmp_path: Path) -> None:
    graph = build_definitions(staged(demo(tmp_path))).resolve_asset_graph()

    def parents(*path: str) -> set[str]:
        return {key.to_user_string() for key in graph.get(dg.AssetKey(path)).parent_keys}

    assert parents("tokenizers", "rgb") == {"tokenizers/train_set", "tokenizers/train_set_first"}
    assert parents("tokenizers", "depth") == {"tokenizers/train_set"}
    labels = {f"imagenet/labels/{label}" for label in ("depth", "normal", "semseg", "det")}
    assert parents("tokenizers", "train_set_first") == {"imagenet/images", *labels}
    assert parents("imagenet", "labels", "depth") == {"imagenet/images"}
    assert parents("tokenizers", "train_set") == {"cc12m/images", *(key.removeprefix("imagenet/") for key in labels)}


def test_only_data_sets_that_tokenizers_see_are_labelled(tmp_path: Path) -> None:
    project = staged(demo(tmp_path), dataset=None)
    graph = build_definitions(project).resolve_asset_graph()
    keys = {key.to_user_string() for key in graph.get_all_asset_keys()}
    assert "imagenet/images" in keys and not any(key.startswith("imagenet/labels") for key in keys)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"more_train_sets": {}}, "stage first of the rgb tokenizer sees the training set first, .* has none"),
        ({"more_datasets": []}, "training set first is of imagenet, which is no dataset"),
    ],
)
def test_what_a_stage_names_must_be_there(tmp_path: Path, change: dict, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Project.model_validate(staged(demo(tmp_path)).model_dump(mode="json") | change)


def test_packed_squares_must_be_large_enough_for_every_side(tmp_path: Path) -> None:
    values = cc12m_4m7(tmp_path).model_dump(mode="json")
    wrong = {
        "side_px": (256, "the rgb tokenizer sees sides of 448 pixels .* raise its side_px"),
        "clip_px": (
            448,
            "the clip tokenizer sees sides of 224, 256, .* has CLIP features of 448: add them to its clip_px",
        ),
    }
    for field, (value, reason) in wrong.items():
        sets = {**values["more_train_sets"]}
        sets["multi_resolution"] = {**sets["multi_resolution"], field: value}
        with pytest.raises(ValidationError, match=reason):
            Project.model_validate({**values, "more_train_sets": sets})


def test_a_tokenizer_serves_when_it_reaches_its_modalitys_bounds(tmp_path: Path) -> None:
    project = demo(tmp_path)
    headline = {"name": "miou", "value": 0.5, "baseline": 0.3, "better": "higher"}
    ref = ModelRef(name="semseg", digest="0", path="p", report={"headline": headline, "usage": 0.6})
    assert not is_good_enough(project, "semseg", ref)  # 0.71 of the baseline's error are left
    bounds = {"semseg": TokenizerBounds(error_share=0.8)}
    assert is_good_enough(project.model_copy(update={"tokenizer_bounds": bounds}), "semseg", ref)
    strict = {"semseg": TokenizerBounds(error_share=0.8, min_usage=0.7)}
    assert not is_good_enough(project.model_copy(update={"tokenizer_bounds": strict}), "semseg", ref)


def test_a_run_labels_the_blocks_that_training_sets_of_other_data_sets_name(tmp_path: Path) -> None:
    project = staged(demo(tmp_path), blocks=["block_01"])
    steps = runner._steps(project)
    jobs = {job.name for job in build_jobs(project)}
    assert {name for name, _ in steps} <= jobs
    labelled = [block for name, block in steps if name == "label_imagenet"]
    assert labelled == ["block_01"]
    order = [name for name, _ in steps]
    assert order.index("ingest_imagenet") < order.index("label_imagenet") < order.index("train_tokenizers")


def test_imagenet_is_the_first_stage_of_the_paper_s_tokenizers_by_settings(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "imagenet.md").read_text()
    settings = re.findall(r"--set '(.+?)'", page.partition("\n## ")[0])
    assert len(settings) == 4
    project = with_settings(cc12m_4m7(tmp_path), settings)
    first = project.tokenizers["depth"].earlier_stages[0]
    train_set = project.train_set_of(first.train_set)
    assert (first.train_set, train_set.dataset) == ("imagenet", "imagenet")
    assert set(train_set.blocks) == set(project.for_dataset("imagenet").layout.block_keys())
    keys = {key.to_user_string() for key in build_definitions(project).resolve_asset_graph().get_all_asset_keys()}
    assert {"imagenet/images", "imagenet/labels/depth", "tokenizers/train_set_imagenet"} <= keys
