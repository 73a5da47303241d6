import json
import multiprocessing
import os
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourmill.core.checkpoint import load_checkpoint
from fourmill.core.digest import digest_file
from fourmill.core.order import batch_indices
from fourmill.core.store import LocalStore
from fourmill.core.work import no_progress
from fourmill.tokenize import train
from fourmill.tokenize import train_set as train_module
from fourmill.tokenize.__main__ import main
from fourmill.tokenize.batches import batch_flips
from fourmill.tokenize.config import TrainingConfig
from fourmill.tokenize.conversions import mirror
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import ModelError, load_image_tokenizer
from fourmill.tokenize.spec import TokenizerSpec
from fourmill.tokenize.state import cosine
from fourmill.tokenize.train import train_tokenizer
from fourmill.tokenize.train_set import TrainSetError


class _KilledError(Exception):
    pass


def _kill_at(step):
    def progress(done, total, note):
        if done >= step:
            raise _KilledError

    return progress


@pytest.mark.parametrize(("label", "ema"), [("depth", None), ("semseg", 0.9)])
def test_a_killed_training_resumes_to_the_very_same_tokenizer(spec, read_report, monkeypatch, label, ema):
    monkeypatch.setattr(train, "_REPORT_EVERY_S", 0)
    whole = spec(label, folder="whole", checkpoint_every=2, ema_decay=ema)
    first = read_report(train_tokenizer(whole, no_progress))
    LocalStore(whole.store).delete(f"models/tok_{label}/trained/{whole.input_digest}/report.json")
    again = spec(label, folder="again", checkpoint_every=2, ema_decay=ema)
    for step in (1, 3, 5):
        with pytest.raises(_KilledError):
            train_tokenizer(again, _kill_at(step))
    second = read_report(train_tokenizer(again, no_progress))
    assert second["digest"] == first["digest"]
    assert second["curve"] == first["curve"]
    assert second["figures"] == first["figures"]
    assert [path.name for path in Path(again.run_folder).glob("*")] == ["tensorboard"]


def test_kill_9_at_any_steps_and_resume_give_the_same_curve_and_tokenizer(spec, read_report, tmp_path):
    def one(folder: str) -> TokenizerSpec:
        return spec("clip", folder=folder, steps=30, checkpoint_every=2, ema_decay=0.9)

    whole = read_report(train_tokenizer(one("whole"), no_progress))
    again = one("again")
    LocalStore(again.store).delete(f"models/tok_clip/trained/{again.input_digest}/report.json")
    file, folder = tmp_path / "spec.json", Path(again.run_folder)
    file.write_text(again.model_dump_json())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fourmill.tokenize.train"])
    for kill in range(3):
        before = load_checkpoint(folder, again.input_digest)
        process = context.Process(target=main, args=(["--spec", str(file)],))
        process.start()
        while process.is_alive():
            found = load_checkpoint(folder, again.input_digest)
            if found and (not before or found["step"] > before["step"] + kill):
                process.kill()
                process.join()
        assert process.exitcode == -signal.SIGKILL
    resumed = read_report(train_tokenizer(again, no_progress))
    for name in ("digest", "curve", "figures", "live_figures", "steps"):
        assert resumed[name] == whole[name], name


def test_a_second_training_from_equal_inputs_returns_at_once(spec):
    once = spec("clip", steps=2)
    steps = []
    path = train_tokenizer(once, lambda *event: steps.append(event))
    assert steps
    assert train_tokenizer(once, _kill_at(0)) == path
    other = spec("clip", steps=2, seed=1)
    assert other.input_digest != once.input_digest


def test_a_checkpoint_of_other_inputs_or_a_damaged_one_is_not_resumed(spec, read_report, monkeypatch):
    monkeypatch.setattr(train, "_REPORT_EVERY_S", 0)
    with pytest.raises(_KilledError):
        train_tokenizer(spec("clip", checkpoint_every=2), _kill_at(3))
    other = spec("clip", seed=1)
    fresh = read_report(train_tokenizer(other, no_progress))
    Path(other.run_folder, "checkpoint.pt").write_bytes(b"cut")
    LocalStore(other.store).delete(f"models/tok_clip/trained/{other.input_digest}/report.json")
    assert read_report(train_tokenizer(other, no_progress))["digest"] == fresh["digest"]


@pytest.mark.parametrize("label", ["rgb", "normal", "clip"])
def test_training_lowers_the_loss_and_reports_what_came_of_it(spec, store, read_report, label):
    report = read_report(train_tokenizer(spec(label, steps=12), no_progress))
    losses = [loss for _, loss in report["curve"]]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert report["steps"] == 12 and report["num_train"] == 30 and report["num_eval"] == 6
    assert report["figures"].keys() == report["baseline"].keys()
    assert report["headline"]["value"] == report["figures"][report["headline"]["name"]]
    assert 0 < report["usage"] <= 1 and report["perplexity"] >= 1
    preview = store.read(report["preview"])
    assert preview.startswith(b"\x89PNG") and len(preview) < 100_000
    card = store.read(f"{report['path']}/card.md").decode()
    assert report["digest"] in card and report["train_set"] in card
    model = load_image_tokenizer(store, report["path"])
    assert not model.training and model.config == spec(label, steps=12).config


def test_the_training_set_must_be_the_one_that_was_named(spec, store, train_set):
    wrong = spec("rgb").model_copy(update={"train_set_digest": "0" * 64})
    with pytest.raises(TrainSetError, match="materialize tokenizers/train_set again"):
        train_tokenizer(wrong, no_progress)
    missing = spec("rgb").model_copy(update={"train_set": "nowhere"})
    with pytest.raises(TrainSetError, match="no training set at nowhere"):
        train_tokenizer(missing, no_progress)


def test_the_training_set_is_compared_before_the_processes_join(spec, monkeypatch):
    """They would wait for that, and not for long."""
    monkeypatch.setattr(train, "join_ranks", None)
    wrong = spec("rgb").model_copy(update={"train_set_digest": "0" * 64, "processes": 2})
    for rank in ("0", "1"):
        for name, value in {"WORLD_SIZE": "2", "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TrainSetError, match="materialize tokenizers/train_set again"):
            train_tokenizer(wrong, no_progress)


def test_the_training_set_is_hashed_once_however_many_processes_start_and_again_when_it_was_changed(
    spec, store, train_set, monkeypatch
):
    hashed, file = [], store.path(train_set.path)

    def digest_of(path: Path) -> str:
        hashed.append(path)
        return digest_file(path)

    def begin() -> None:
        train_module._digest_of.cache_clear()  # what another process would not know
        with pytest.raises(_KilledError):
            train_tokenizer(spec("rgb"), _kill_at(0))

    monkeypatch.setattr(train, "_REPORT_EVERY_S", 0)
    monkeypatch.setattr(train_module, "digest_file", digest_of)
    for _ in range(3):
        begin()
    assert hashed == [file]
    changed = file.stat().st_mtime_ns + 1
    os.utime(file, ns=(changed, changed))
    for _ in range(2):
        begin()
    assert hashed == [file] * 2
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(changed, changed + 1))
    for _ in range(2):
        with pytest.raises(TrainSetError, match="materialize tokenizers/train_set again"):
            train_tokenizer(spec("rgb"), no_progress)


def test_a_damaged_model_is_refused(spec, store, read_report):
    path = read_report(train_tokenizer(spec("clip", steps=1), no_progress))["path"]
    weights = store.read(f"{path}/model.safetensors")
    store.write(f"{path}/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelError, match="weights or a config of another digest"):
        load_image_tokenizer(store, path)
    store.write(f"{path}/model.safetensors", weights[:-100])
    with pytest.raises(ModelError, match="damaged"):
        load_image_tokenizer(store, path)
    with pytest.raises(ModelError, match="train or import"):
        load_image_tokenizer(store, "models/none")


def test_the_program_prints_progress_and_the_report_and_exits_by_what_happened(spec, store, tmp_path, capsys):
    file = tmp_path / "spec.json"
    file.write_text(spec("clip", steps=2).model_dump_json())
    assert main(["--spec", str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["total"] == 2 and {"done", "total", "note"} == lines[0].keys()
    assert store.exists(lines[-1]["report"])
    file.write_text(spec("clip", steps=3).model_copy(update={"train_set": "nowhere"}).model_dump_json())
    assert main(["--spec", str(file)]) == 1
    file.write_text('{"store": "x", "colour": 3}')
    assert main(["--spec", str(file)]) == 2


def test_every_sample_is_seen_once_an_epoch_and_batches_come_from_seed_and_step():
    seen = np.concatenate([batch_indices(10, 4, seed=3, step=s) for s in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:])
    assert np.array_equal(batch_indices(10, 4, 3, 2), seen[8:12])
    assert not np.array_equal(batch_indices(10, 4, 4, 2), seen[8:12])
    flips = np.stack([batch_flips(32, 0, s) for s in range(40)])
    assert 0.4 < flips.mean() < 0.6 and not np.array_equal(flips[0], flips[1])


def test_mirroring_turns_normals_round():
    normal = np.zeros((2, 1, 2, 3), np.float32)
    normal[:, 0, 0, 0] = 1
    mirrored = mirror(normal, np.array([True, False]), "normal")
    assert mirrored[0, 0, 1].tolist() == [-1, 0, 0] and np.array_equal(mirrored[1], normal[1])


def _rates(at: range, **values) -> list[float]:
    training = TrainingConfig(loss="mse", batch_size=1, learning_rate=2.0, **values)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule, rates = cosine(optimizer, training), []
    for step in at:
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_the_learning_rate_warms_up_and_decays_to_nothing():
    rates = _rates(range(101), steps=100, warmup_steps=10)
    assert rates[:11] == pytest.approx([2 * (step + 1) / 11 for step in range(11)])
    assert rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01 and rates[100] == 0
    assert all(b < a for a, b in pairwise(rates[10:]))


@given(st.integers(1, 40), st.integers(0, 50), st.data())
def test_a_learning_rate_follows_from_its_step_alone(steps, warmup, data):
    rates = _rates(range(steps), steps=steps, warmup_steps=warmup)
    assert all(0 < rate <= 2 for rate in rates)
    first = data.draw(st.integers(0, steps - 1))
    assert _rates(range(first, steps), steps=steps, warmup_steps=warmup) == rates[first:]


def test_scoring_half_of_the_tokens_scores_all_in_the_mean(spec):
    torch.manual_seed(0)
    config = spec("semseg").config
    model = ImageTokenizer(config)
    x = torch.randint(0, 134, (8, 64, 64))
    with torch.no_grad():
        part = np.mean([float(model.eval().loss(x, torch.Generator().manual_seed(i))[0]) for i in range(6)])
    full = config.model_copy(update={"training": config.training.model_copy(update={"scored_share": 1.0})})
    model.config = full
    with torch.no_grad():
        assert part == pytest.approx(float(model.loss(x, torch.Generator())[0]), rel=0.02)
