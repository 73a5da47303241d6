"""The manifest that was published is what all read, whatever is made of blocks meanwhile."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fourmill.core.shards import MissingShardError
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime import manifests
from fourmill.runtime.manifests import current_manifest, publish_manifest
from fourmill.runtime.models import ModelMissingError, current, pointer_path, set_current
from fourmill.runtime.session import Session
from fourmill.tokenize.manifest import ManifestError


@pytest.fixture
def session(smallest_demo: Path, tmp_path: Path) -> Session:
    """Of the smallest demo, copied, to be changed."""
    workspace = Workspace(tmp_path / "out")
    shutil.copytree(smallest_demo, workspace.out)
    return Session(workspace.project())


@pytest.mark.ray
def test_a_manifest_is_what_was_published_though_more_blocks_have_begun(session: Session) -> None:
    found, path = current_manifest(session)
    assert publish_manifest(session) == (found, path)
    layout = session.project.layout
    larger = layout.model_copy(update={"num_blocks": layout.num_blocks + 1})
    growing = replace(session, project=session.project.model_copy(update={"layout": larger}))
    assert current_manifest(growing) == (found, path)
    with pytest.raises(MissingShardError):
        publish_manifest(growing)
    assert current_manifest(growing) == (found, path)


@pytest.mark.ray
def test_a_manifest_of_tokens_that_the_serving_tokenizer_has_not_made_is_refused(session: Session) -> None:
    store, dataset = session.store, session.project.dataset
    ref = current(store, dataset, "depth", "")
    set_current(store, dataset, ref.model_copy(update={"digest": "f" * 64}))
    with pytest.raises(
        ManifestError, match=f"is of tokenizer {ref.digest[:12]}, and ffffffffffff serves: .*tokens/depth,"
    ):
        current_manifest(session)


@pytest.mark.ray
def test_one_that_covers_too_little_is_kept_and_not_used(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    store, dataset = session.store, session.project.dataset
    store.delete(pointer_path(dataset, "manifest"))
    monkeypatch.setattr(manifests, "MIN_COVERAGE", 1.1)
    _, path = publish_manifest(session)
    assert store.exists(path)
    with pytest.raises(ModelMissingError, match="materialize tokens/manifest first"):
        current_manifest(session)


@pytest.mark.ray
def test_one_that_is_gone_or_damaged_is_said(session: Session) -> None:
    _, path = current_manifest(session)
    for change in (lambda: session.store.write(path, b"{}"), lambda: session.store.delete(path)):
        change()
        with pytest.raises(ManifestError, match=f"{path} is gone or damaged: materialize tokens/manifest again"):
            current_manifest(session)
