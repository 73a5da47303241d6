"""Held-out samples scored by several processes: the same as by one, however few there are."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fourmill.core.shards import ShardPlace, need, write_receipt
from fourmill.pipelines.workspace import Workspace
from fourmill.runtime.generation import Generator, joined
from fourmill.runtime.heldout import read_heldout
from fourmill.runtime.manifests import current_manifest
from fourmill.runtime.samples import evaluate, make_samples
from fourmill.runtime.session import Session
from fourmill.runtime.training import make_train_set


@pytest.fixture
def session(smallest_demo: Path, tmp_path: Path) -> Session:
    """The smallest demo's project over a copy of its store, which may be changed."""
    project = Workspace(smallest_demo).project()
    shutil.copytree(project.store, tmp_path / "store")
    return Session(project.model_copy(update={"store": str(tmp_path / "store")}))


@pytest.mark.ray
def test_what_parts_make_is_what_all_make_at_once(session: Session) -> None:
    rgb = read_heldout(session.store, current_manifest(session)[0], 3).maps["rgb"]
    generator = Generator(session)
    whole = generator.from_rgb(rgb)
    parts = joined([generator.from_rgb(rgb[:1]), generator.from_rgb(rgb[1:], 1)])
    assert (parts.captions, parts.boxes) == (whole.captions, whole.boxes)
    for label, maps in whole.maps.items():  # the same tokens; decoding rounds by how many it decodes at once
        assert np.abs(np.subtract(parts.maps[label], maps, dtype=np.float64)).mean() < 1e-3, label


@pytest.mark.ray
def test_one_sample_is_scored_however_many_processes_there_are(session: Session) -> None:
    samples = session.project.samples.model_copy(update={"num_scored": 1})
    project = session.project.model_copy(update={"samples": samples, "fourm_processes": 2})
    assert evaluate(Session(project)).num_samples == 1


@pytest.mark.ray
def test_held_out_samples_are_compared_with_mean_maps_of_their_own_size(session: Session) -> None:
    """Though whole images are packed, larger than what is generated."""
    project = session.project
    larger = project.train_set.model_copy(update={"side_px": 2 * project.input_px})
    samples = project.samples.model_copy(update={"num_scored": 1})
    wide = Session(project.model_copy(update={"train_set": larger, "samples": samples}))
    make_train_set(wide)
    assert 0 < evaluate(wide).baseline["depth_error"] < 2


@pytest.mark.ray
def test_figures_of_other_samples_are_not_shown_beside_these(session: Session) -> None:
    path = session.project.runs_path("evaluation/figures.json")
    kept = json.loads(session.store.read(path))
    session.store.write(path, json.dumps({**kept, "manifest": "another"}).encode())
    with pytest.raises(ValueError, match=r"figures of manifest another, .*; materialize fourm/evaluation first"):
        make_samples(session)
    session.store.delete(path)
    with pytest.raises(ValueError, match="figures of manifest None"):
        make_samples(session)


@pytest.mark.ray
@pytest.mark.parametrize("folder", ["depth", "tok_depth@64", "rgb"])
def test_figures_are_never_of_other_tars_than_the_manifests(session: Session, folder: str) -> None:
    """As while a block is made again: what is there is another picture, label or token than the manifest was made of."""
    store, (manifest, _) = session.store, current_manifest(session)
    place = ShardPlace(manifest.dataset, "val", folder, manifest.splits["val"][0].shard)
    receipt = need(store, place, "")
    write_receipt(store, place, receipt.model_copy(update={"tar_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=f"{place.tar} is not what the manifest {manifest.digest[:12]} was made of"):
        read_heldout(store, manifest, 3)
