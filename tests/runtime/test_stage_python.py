"""A stage with a Python of its own: its actors really run under it, and those of other stages do not."""

import re
import sys
from pathlib import Path

import pytest

from fourmill.core.shards import Recipe
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.ray_session import PythonMissingError, RayConfig, StageShare
from fourmill.runtime.session import Session
from fourmill.runtime.stage_python import ask_python
from fourmill.runtime.stages import BlockStage, run_block


@pytest.fixture
def other_python(tmp_path: Path) -> Path:
    """This Python by another name, which marks what runs under it: as one with libraries that the main one must not have."""
    path = tmp_path / "other" / "python"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexport ECHO_PYTHON=other\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def echo_stage(session: Session, asset: str) -> BlockStage:
    return BlockStage(
        asset=asset,
        folder="echo",
        factory="echo_worker:MarkedEchoWorker",
        arguments={"root": session.project.store},
        recipe=lambda split, shard: Recipe(stage=asset, code_version="1"),
    )


def under(python: Path, tmp_path: Path) -> Session:
    """A project whose boxes are made under another Python."""
    share = StageShare(runtime_env={"py_executable": str(python)})
    ray = RayConfig(num_workers=2, stages={"labels/det": share})
    return Session(smallest(tmp_path).model_copy(update={"ray": ray}))


@pytest.mark.ray
def test_actors_of_a_stage_run_under_the_python_that_the_project_names_for_it(
    tmp_path: Path, other_python: Path, ray_session: None
) -> None:
    session = under(other_python, tmp_path)

    def marks(asset: str, block: str) -> set[str]:
        shards = session.project.layout.shards_of(block)
        assert run_block(session, echo_stage(session, asset), block) == 2 * len(shards)
        found = [path for path in session.store.list("marks") if int(Path(path).stem) in shards]
        assert len(found) == 2 * len(shards)
        return {session.store.read(path).decode() for path in found}

    assert marks("labels/det", "block_00") == {"other"}
    assert marks("labels/depth", "block_01") == {"none"}


def test_a_python_that_is_not_there_is_missed_before_a_ray_starts(tmp_path: Path) -> None:
    session = under(tmp_path / "gone" / "python", tmp_path)
    with pytest.raises(
        PythonMissingError, match=r"labels/det: there is no \S*gone/python on this machine.*infra/detectron2"
    ):
        run_block(session, echo_stage(session, "labels/det"), "block_00")


def test_a_python_is_asked_what_an_actor_needs(
    tmp_path: Path, other_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask_python([str(other_python)]).lacks == ()
    (lack,) = ask_python([sys.executable], ["ray", "no_such_library"]).lacks
    assert lack == "cannot import no_such_library (No module named 'no_such_library'): install no_such_library in it"
    (lack,) = ask_python([sys.executable], ["fourmill.pseudolabel.vitdet:require_detectron2"]).lacks
    assert "detectron2" in lack
    older = "import sys; sys.version_info = (*sys.version_info[:2], 99); "
    older_python = tmp_path / "older"
    older_python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{older}exec(sys.argv.pop(1))" "$4" "$5"\n')
    older_python.chmod(0o755)
    (lack,) = ask_python([str(older_python)], ["json"]).lacks
    assert re.match(r"is Python 3\.\d+\.99 and must be 3\.\d+\.\d+, as here", lack)
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    assert ask_python([str(older_python)], ["json"]).lacks == ()
    (lack,) = ask_python(["sh", "-c", "echo no module named ray >&2; exit 1"]).lacks
    assert "does not run (exit code 1: no module named ray)" in lack
