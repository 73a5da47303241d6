"""What `tokens/*` are called at one and at two resolutions, and which projects have a second one."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from fourmill.pipelines.profiles import cc12m_4m7, demo
from fourmill.pseudolabel.config import ClipConfig
from fourmill.pseudolabel.stored import WeightsMissingError
from fourmill.runtime.models import ModelMissingError
from fourmill.runtime.project import Project
from fourmill.runtime.samples import make_samples
from fourmill.runtime.session import Session
from fourmill.runtime.stages import token_stage
from fourmill.runtime.token_assets import token_assets
from fourmill.runtime.workers import token_modalities


def changed(project: Project, **values: object) -> Project:
    return Project.model_validate({**project.model_dump(), **values})


def test_the_second_resolution_carries_its_size_in_its_name(tmp_path: Path) -> None:
    assets = token_assets(demo(tmp_path))
    assert list(assets) == ["rgb", "depth", "normal", "semseg", "clip", "rgb_32", "caption", "det"]
    small = assets["rgb_32"]
    assert (small.label, small.modality, small.tokenizer, small.px) == ("rgb", "tok_rgb@32", "rgb", 32)
    assert assets["det"].tokenizer == "text" and assets["rgb"].px == 64
    paper = token_assets(cc12m_4m7(tmp_path))
    assert [name for name in paper if name.endswith("_448")] == [
        f"{label}_448" for label in ("rgb", "depth", "normal", "semseg", "clip")
    ]


def test_without_clips_weights_nothing_that_takes_its_features_is_begun(tmp_path: Path) -> None:
    """Before the tokenizer, the manifest or anything else is asked for: those need no GPU, what is made of them does."""
    base = demo(tmp_path)
    lacking = base.model_copy(update={"labellers": {**base.labellers, "clip": ClipConfig(weights="stored:clip")}})
    session = Session(lacking)
    for begin in (lambda: token_stage(session, "clip"), lambda: make_samples(session)):
        with pytest.raises(WeightsMissingError, match="fourmill weights add clip hf:"):
            begin()
    with pytest.raises(ModelMissingError, match="tokenizers/rgb"):
        token_stage(session, "rgb")


def test_every_tokenized_modality_has_one_asset(tmp_path: Path) -> None:
    for project in (demo(tmp_path), cc12m_4m7(tmp_path)):
        assert sorted(a.modality for a in token_assets(project).values()) == sorted(token_modalities(project))
        assert token_assets(project)["rgb"].modality == f"tok_rgb@{project.input_px}"


def test_a_project_of_one_resolution_has_no_second_assets(tmp_path: Path) -> None:
    project = changed(demo(tmp_path), second_px=None, second_labels=(), superres=None)
    assert not any("_" in name for name in token_assets(project))
    assert set(project.modalities()) == {n for n in demo(tmp_path).modalities() if not n.endswith("@32")}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"second_px": None}, "need a second resolution"),
        ({"superres": None}, "second_px 32 needs a superres config"),
        ({"second_labels": ("depth",)}, "rgb in second_labels"),
        ({"second_px": 64}, "another side than input_px 64"),
        ({"second_px": 36}, "must be a multiple of 8 for the rgb tokenizer"),
        ({"second_labels": ("rgb", "edges")}, "second_labels"),
    ],
)
def test_resolutions_that_do_not_fit_are_refused(tmp_path: Path, values: dict, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        changed(demo(tmp_path), **values)
