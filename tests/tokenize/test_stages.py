import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fourmill.core.store import LocalStore, open_store
from fourmill.core.work import no_progress
from fourmill.pipelines.profiles import smallest
from fourmill.runtime.launch import ProgramError
from fourmill.runtime.models import ModelRef, set_current
from fourmill.runtime.project import Project
from fourmill.runtime.session import Session
from fourmill.runtime.training import train_tokenizer as train_tokenizer_of
from fourmill.tokenize import train
from fourmill.tokenize.bounds import TokenizerBounds
from fourmill.tokenize.config import TrainSetConfig
from fourmill.tokenize.load import ModelError, load_image_tokenizer
from fourmill.tokenize.presets import paper_tokenizers
from fourmill.tokenize.spec import StageRecord
from fourmill.tokenize.state import start
from fourmill.tokenize.train import train_tokenizer
from fourmill.tokenize.train_set import build_train_set, read_label


def _record(report: dict) -> StageRecord:
    kept = {key: report[key] for key in ("digest", "path", "train_set", "steps", "skipped_steps")}
    return StageRecord(name=report["stage"], headline="x", value=report["headline"]["value"], **kept)


def test_a_stage_goes_on_from_the_one_before_at_several_sides(spec, store, read_report):
    first = read_report(train_tokenizer(spec("semseg", steps=4, name="base"), no_progress))
    plain = spec("semseg", folder="second", steps=3, name="multi", sides_px=(32, 64))
    second = plain.model_copy(update={"earlier": (_record(first),)})
    assert second.input_digest != plain.input_digest
    report = read_report(train_tokenizer(second, no_progress))
    assert [stage["digest"] for stage in report["earlier_stages"]] == [first["digest"]]
    assert report["stage"] == "multi" and report["digest"] != first["digest"]
    card = store.read(f"{report['path']}/card.md").decode()
    assert first["digest"] in card and "| base | 4 | 0 |" in card
    begun = load_image_tokenizer(store, first["path"])
    state = start(second.config, read_label(store, second.train_set, second.train_set_digest, "semseg"), begun=begun)
    assert all(torch.equal(value, begun.state_dict()[key]) for key, value in state.model.state_dict().items())
    assert load_image_tokenizer(store, report["path"]).config == second.config


SQUEEZED = TrainSetConfig(num_samples=20, num_eval=4, blocks=("block_00", "block_01"), side_px=96)


@pytest.fixture
def three_stages(store: LocalStore, tiny: Any, tmp_path: Path) -> Callable[[str], Project]:
    """A project with a store of its own, whose depth tokenizer is trained in three stages on two training sets."""

    def make(name: str) -> Project:
        project = smallest(tmp_path / name)
        shutil.copytree(store.root, project.store)
        mine = open_store(project.store)
        larger = build_train_set(mine, tiny.dataset, tiny.layout, SQUEEZED, 64, tiny.features)
        for ref, made in (("train_set", tiny.train_set), ("train_set_larger", larger)):
            set_current(mine, project.dataset, ModelRef(name=ref, digest=made.digest, path=made.path))
        config = project.tokenizers["depth"]
        first = config.training.model_copy(update={"name": "first", "steps": 4, "ema_decay": 0.9})
        drawn = {"train_set": "larger", "crop_scale": (0.3, 1.0), "steps": 24, "checkpoint_every": 2}
        second = first.model_copy(update={**drawn, "name": "second"})
        third = second.model_copy(update={"name": "third", "sides_px": (32, 64, 96)})
        update = {"earlier_stages": (first, second), "training": third}
        tokenizers = {**project.tokenizers, "depth": config.model_copy(update=update)}
        changed = project.model_copy(update={"tokenizers": tokenizers, "more_train_sets": {"larger": SQUEEZED}})
        return Project.model_validate(changed.model_dump())

    return make


def test_kill_9_in_later_stages_and_resume_give_the_same_curves_and_tokenizer(three_stages, kill_at):
    whole = train_tokenizer_of(Session(three_stages("whole")), "depth").report
    project = three_stages("again")
    folder = Session(project).folder("tokenizer_depth")
    for stage, step in (("second", 4), ("third", 6), ("third", 14)):
        kill = kill_at(str(folder / stage / "checkpoints-*" / "checkpoint.pt"), step)
        with pytest.raises(ProgramError, match="ended with code -9"):
            train_tokenizer_of(Session(project, listener=lambda _, *event, kill=kill: kill(*event)), "depth")
        assert (folder / "third").exists() == (stage == "third")
    resumed = train_tokenizer_of(Session(project), "depth").report
    assert "trained from the same inputs before" in (folder / "second" / "log.txt").read_text()
    assert "resumed at step" in (folder / "third" / "log.txt").read_text()
    for name in ("digest", "curve", "figures", "live_figures", "usage", "steps", "earlier_stages"):
        assert resumed[name] == whole[name], name
    assert [stage["name"] for stage in whole["earlier_stages"]] == ["first", "second"]


def test_what_is_only_told_of_a_training_does_not_make_it_another(spec, store, read_report):
    plain, told = spec("depth", steps=3), spec("depth", "told", steps=3, name="more", log_every=1, score_every=1)
    assert told.input_digest == plain.input_digest
    assert spec("depth", steps=3, seed=1).input_digest != plain.input_digest
    weights = []
    for one in (plain, told):
        path = train_tokenizer(one, no_progress)
        weights.append(store.read(f"{read_report(path)['path']}/model.safetensors"))
        store.delete(path)
    assert weights[0] == weights[1]


def test_a_stage_of_another_shape_is_refused(spec, store, read_report):
    first = read_report(train_tokenizer(spec("clip", steps=1), no_progress))
    other = spec("clip", folder="other", name="more")
    quantizer = other.config.quantizer.model_copy(update={"codebook_size": 64})
    config = other.config.model_copy(update={"quantizer": quantizer})
    wrong = other.model_copy(update={"config": config, "earlier": (_record(first),)})
    with pytest.raises(ModelError, match="stage more of clip cannot go on from a tokenizer of another shape"):
        train_tokenizer(wrong, no_progress)


def test_the_log_has_every_step_once_however_often_it_was_killed(spec, read_report, monkeypatch):
    monkeypatch.setattr(train, "_REPORT_EVERY_S", 0)
    one = spec("rgb", steps=8, checkpoint_every=3, log_every=1, score_every=4)

    class KilledError(Exception):
        pass

    def kill(done: int, total: int, note: str) -> None:
        if done == 5:
            raise KilledError

    with pytest.raises(KilledError):
        train_tokenizer(one, kill)
    report = read_report(train_tokenizer(one, no_progress))
    assert Path(report["tensorboard"]) == Path(one.run_folder) / "tensorboard"
    log = EventAccumulator(report["tensorboard"]).Reload()
    for name in ("loss", "learning_rate", "gradient_norm", "skipped_steps"):
        assert [event.step for event in log.Scalars(f"train/{name}")] == list(range(1, 9))
    rates = [event.value for event in log.Scalars("train/learning_rate")]  # two steps of warm-up, six down
    shares = [1 / 3, 2 / 3, 1, 0.933, 0.75, 0.5, 0.25, 0.067]
    assert rates == pytest.approx([1.6e-3 * share for share in shares], rel=1e-3)
    losses = {event.step: event.value for event in log.Scalars("train/loss")}
    assert all(losses[step] == pytest.approx(loss, abs=1e-5) for step, loss in report["curve"])
    assert [event.step for event in log.Scalars("held_out/psnr_db")] == [4, 8]
    assert log.Scalars("held_out/ssim")[-1].value == pytest.approx(report["figures"]["ssim"])
    pictures = log.Images("held_out/reconstructions")
    assert [picture.step for picture in pictures] == [4, 8] and pictures[0].width > 500


def test_the_papers_recipe_has_its_stages():
    for label, config in paper_tokenizers().items():
        assert [stage.name for stage in config.stages] == ["imagenet", "cc12m", "multi_resolution"]
        first, second, last = config.stages
        batch = 1024 if label == "clip" else 640
        assert first.batch_size == second.batch_size == batch
        assert first.steps == 100 * (1_281_167 // batch) and second.steps == 15 * (12_000_000 // batch)
        assert last.batch_size == (80 if label == "semseg" else 128)
        assert last.sides_px == (224, 256, 288, 320, 352, 384, 416, 448)
        assert last.steps == (5 if label == "rgb" else 1) * (12_000_000 // last.batch_size)
        threshold = config.at_stage(last).stale_threshold
        assert threshold == last.batch_size * 21**2 / (32 * config.codebook_size)  # tokens of the middle side, 336


@pytest.mark.parametrize(
    ("name", "better", "baseline", "value"),
    [("psnr_db", "higher", 16.0, 17.6), ("miou", "higher", 0.3, 0.52), ("degrees", "lower", 20.0, 13.9)],
)
def test_a_bound_is_a_share_of_the_baselines_error_or_a_figure(name, better, baseline, value):
    headline = {"name": name, "better": better, "baseline": baseline, "value": value}
    assert TokenizerBounds().reaches(headline)
    assert not TokenizerBounds().reaches({**headline, "value": baseline})
    assert not TokenizerBounds(error_share=0.5).reaches(headline)
    assert TokenizerBounds(error_share=None).reaches({**headline, "value": baseline})
    assert TokenizerBounds(headline=value).reaches(headline)
    worse = value - 0.1 if better == "higher" else value + 0.1
    assert not TokenizerBounds(headline=value).reaches({**headline, "value": worse})
