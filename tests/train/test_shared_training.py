import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fourmill.core.ranks import Ranks, RanksError
from fourmill.core.store import LocalStore
from fourmill.core.work import no_progress
from fourmill.runtime.launch import ProgramError, run_program
from fourmill.train.config import PretrainConfig, TrainSpec
from fourmill.train.data import Loader, checked_manifest, read_samples
from fourmill.train.loop import train_fourm
from fourmill.train.masking import Mixture

Make = Callable[..., TrainSpec]


def test_processes_share_the_rows_of_a_batch_and_draw_the_same_masks(store: tuple, config: PretrainConfig):
    manifest = checked_manifest(*store)
    samples = read_samples(store[0], manifest, "train")
    mixture = Mixture(config.masking, sorted(map(manifest.modality, manifest.modalities), key=lambda m: m.name))
    whole = Loader(samples, mixture, 4, 0, 8).batch(3)
    for rank in (0, 1):
        rows = Ranks(rank, 2).rows(4)
        part = Loader(samples, mixture, 4, 0, 8, rows).batch(3)
        for i, row in enumerate(rows):
            seen = part.targets.id_BM[i]
            assert np.array_equal(seen[seen > 0], whole.targets.id_BM[row][whole.targets.id_BM[row] > 0])
            visible = part.inputs.id_BN[i]
            assert np.array_equal(visible[visible > 0], whole.inputs.id_BN[row][whole.inputs.id_BN[row] > 0])


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared by 2 processes"):
        Ranks(0, 2).rows(5)


def test_two_processes_train_one_model_and_a_killed_pair_resumes_to_it(make_spec: Make, tmp_path: Path):
    spec = make_spec(processes=2)
    store = LocalStore(spec.store)

    def train(progress: Callable[[int, int, str], None] = no_progress) -> dict:
        return json.loads(store.read(run_program("fourmill.train", spec, tmp_path / "log", 1, progress, 2)))

    class Enough(Exception):
        pass

    def stop(done: int, total: int, note: str) -> None:
        if done:
            raise Enough

    first = train()
    store.delete(f"models/fourm/trained/{spec.input_digest}/report.json")
    with pytest.raises(Enough):
        train(stop)
    assert train()["digest"] == first["digest"]
    alone = json.loads(store.read(train_fourm(make_spec(), no_progress)))
    assert alone["digest"] != first["digest"]
    assert first["loss_curve"][0][1] == pytest.approx(alone["loss_curve"][0][1], rel=0.1)


def test_a_failed_program_shows_the_end_of_its_log(make_spec: Make, tmp_path: Path):
    spec = make_spec(processes=2, manifest="cc12m/manifests/no.json")
    with pytest.raises(ProgramError, match="materialize tokens/manifest"):
        run_program("fourmill.train", spec, tmp_path / "log", 1, no_progress, 2)


def test_a_training_for_two_is_not_started_alone(make_spec: Make):
    with pytest.raises(RanksError, match="torchrun --standalone --nproc-per-node 2"):
        train_fourm(make_spec(processes=2), no_progress)
