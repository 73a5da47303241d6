"""A project whose store is not a folder keeps its logs and checkpoints in one that is."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from fourmill.pipelines.profiles import smallest
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session


def test_a_remote_store_needs_a_local_scratch_folder(tmp_path: Path) -> None:
    fields = smallest(tmp_path).model_dump(mode="json")
    for scratch in (None, "s3://bucket/scratch"):
        with pytest.raises(ValidationError, match=r"'s3://bucket/x' is no local folder: give `scratch` one"):
            Project.model_validate({**fields, "store": "s3://bucket/x", "scratch": scratch})
    project = Project.model_validate({**fields, "store": "s3://bucket/x", "scratch": str(tmp_path / "scratch")})
    assert Session(project).folder("a") == tmp_path / "scratch" / "cc12m" / "runs" / "a"
    assert Session(project).store.root == "s3://bucket/x"


def test_a_local_store_is_its_own_scratch_folder(tmp_path: Path) -> None:
    assert Session(smallest(tmp_path)).folder("a") == tmp_path / "store" / "cc12m" / "runs" / "a"


def test_projects_of_two_datasets_in_one_store_keep_their_runs_apart(tmp_path: Path) -> None:
    project = smallest(tmp_path)
    other = project.model_copy(update={"dataset": "imagenet"})
    assert Session(project).folder("tokenizer_rgb") != Session(other).folder("tokenizer_rgb")
    assert project.runs_path("samples/index.html") != other.runs_path("samples/index.html")
