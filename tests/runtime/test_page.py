"""The page at the end: what it says is true of the project whose page it is."""

import html
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from fourmill.core.names import SampleKey
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.heldout import read_heldout
from fourmill.runtime.manifests import current_manifest
from fourmill.runtime.page import PATH, _project_folder, _trace_command, write_page
from fourmill.runtime.session import Session
from fourmill.runtime.trace import trace_anything


@pytest.mark.ray
def test_the_command_at_the_end_follows_a_sample_that_is_shown(smallest_demo: Path) -> None:
    session = Session(Workspace(smallest_demo).project())
    words = shlex.split(trace_command((smallest_demo / "store/cc12m/runs" / PATH).read_text()))
    assert words[:-1] == ["fourmill", "trace", "fourm", "--out", str(smallest_demo), "--sample"]
    assert (
        words[-1] in read_heldout(session.store, current_manifest(session)[0], session.project.samples.num_shown).keys
    )
    assert trace_anything(session, "fourm", words[-1])[f"sample {words[-1]}"]["split"] == "val"


@pytest.mark.ray
def test_a_page_says_what_to_fill_in_where_the_projects_folder_is_unknown(smallest_demo: Path, tmp_path: Path) -> None:
    project = Workspace(smallest_demo).project()
    shutil.copytree(project.store, tmp_path / "moved")
    moved = Session(project.model_copy(update={"store": str(tmp_path / "moved")}))
    figures = json.loads(moved.store.read(moved.project.runs_path("evaluation/figures.json")))
    write_page(moved, current_manifest(moved)[0], {}, figures, SampleKey("000000019"))
    page = (tmp_path / "moved/cc12m/runs" / PATH).read_text()
    assert "--out FOLDER" in trace_command(page) and "</code>, where FOLDER is the project's</p>" in page


@pytest.mark.ray
def test_the_page_promises_of_no_row_that_every_picture_has_it(smallest_demo: Path) -> None:
    page = (smallest_demo / "store/cc12m/runs" / PATH).read_text()
    assert "its rows are named at the left" in page and "image on top" not in page


def test_the_projects_folder_is_the_one_with_its_file_beside_the_store(tmp_path: Path) -> None:
    assert _project_folder(str(tmp_path / "store")) is None
    (tmp_path / "project.json").touch()
    assert _project_folder(str(tmp_path / "store")) == _project_folder(f"file://{tmp_path}/store") == str(tmp_path)
    assert _project_folder(str(tmp_path / "other")) is None
    assert _project_folder("s3://bucket/store") is None


def test_a_folder_with_a_space_is_one_word_of_the_command() -> None:
    command = _trace_command("/my work/out", SampleKey("000000019"))
    assert command == "fourmill trace fourm --out '/my work/out' --sample 000000019"


def trace_command(page: str) -> str:
    """The command at the page's end."""
    found = re.search(r"<code>(fourmill trace .*)</code>", page)
    assert found
    return html.unescape(found[1])
