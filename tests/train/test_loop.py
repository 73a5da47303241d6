import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourmill.core.checkpoint import load_checkpoint, save_checkpoint
from fourmill.core.store import LocalStore
from fourmill.core.work import no_progress
from fourmill.train import loop
from fourmill.train.config import PretrainConfig, TrainSpec
from fourmill.train.load import ModelError, load_fourm
from fourmill.train.loop import TrainingError, train_fourm

Make = Callable[..., TrainSpec]


class Interrupted(Exception):
    pass


def _stop_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, note: str) -> None:
        if done >= step:
            raise Interrupted

    return progress


def _report(spec: TrainSpec, path: str) -> dict:
    return json.loads(LocalStore(spec.store).read(path))


def test_a_training_leaves_a_model_a_card_and_a_report(make_spec: Make):
    spec, seen = make_spec(), []
    path = train_fourm(spec, lambda done, total, note: seen.append((done, total)))
    store, report = LocalStore(spec.store), _report(spec, path)
    assert path == f"models/fourm/trained/{spec.input_digest}/report.json"
    assert report["path"] == f"models/fourm/{report['digest']}" and report["manifest"] == spec.manifest
    assert report["manifest_digest"] in spec.manifest and report["steps"] == 6 and report["seed"] == 0
    assert set(report["losses"]) <= {"caption", "det", "tok_depth@32", "tok_semseg@32"} and report["losses"]
    assert report["baseline"].keys() == report["losses"].keys()
    assert [point[0] for point in report["loss_curve"]] == [1, 2, 3, 4, 5, 6]
    assert report["consumed"].startswith("24 samples: epochs 0..1 of 18 over shards 00000, 00001")
    assert report["digest"] in store.read(f"{report['path']}/card.md").decode()
    assert seen[-1] == (6, 6)
    assert not list(Path(spec.run_folder).glob("*.pt"))


def test_a_published_model_loads_as_it_was(make_spec: Make):
    spec = make_spec()
    report = _report(spec, train_fourm(spec, no_progress))
    model = load_fourm(LocalStore(spec.store), report["path"])
    assert not model.training and model.patch_px == 8 and model.config == spec.config.model
    assert model.decoder_embeddings["det"].to_logits.weight is model.decoder_embeddings["det"].token_emb.weight  # type: ignore[union-attr]


def test_the_same_inputs_are_trained_once_and_other_inputs_again(make_spec: Make, monkeypatch: pytest.MonkeyPatch):
    spec = make_spec()
    path = train_fourm(spec, no_progress)
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("trained again"))
    assert train_fourm(make_spec(run="elsewhere"), no_progress) == path
    assert make_spec(config=spec.config.model_copy(update={"seed": 1})).input_digest != spec.input_digest
    assert make_spec(init_from="models/fourm/x").input_digest != spec.input_digest
    assert make_spec(config=spec.config.model_copy(update={"checkpoint_every": 9})).input_digest == spec.input_digest


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_an_interrupted_training_ends_with_the_same_weights(
    make_spec: Make, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, average: float
):
    optim = config.optim.model_copy(update={"average_decay": average})
    config = config.model_copy(update={"optim": optim})
    monkeypatch.setattr(loop, "_REPORT_EVERY_S", 0.0)
    straight = make_spec(run="straight", config=config)
    path = train_fourm(straight, no_progress)
    expected = _report(straight, path)
    LocalStore(straight.store).delete(path)
    broken = make_spec(run="broken", config=config)
    for step in (3, 5):  # checkpoints stand at 2 and 4
        with pytest.raises(Interrupted):
            train_fourm(broken, _stop_at(step))
    resumed = _report(broken, train_fourm(broken, no_progress))
    assert resumed["digest"] == expected["digest"]
    assert resumed["loss_curve"] == expected["loss_curve"]


def test_a_killed_program_ends_with_the_same_weights(make_spec: Make, config: PretrainConfig, tmp_path: Path):
    config = config.model_copy(update={"steps": 40, "checkpoint_every": 1})  # killed with a checkpoint at hand
    spec = make_spec(config=config)
    expected = _report(spec, path := train_fourm(spec, no_progress))
    LocalStore(spec.store).delete(path)
    file = tmp_path / "spec.json"
    file.write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "fourmill.train", "--spec", str(file)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert program.stdout is not None
    json.loads(program.stdout.readline())
    program.send_signal(signal.SIGKILL)
    program.wait()
    program.stdout.close()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[-1] == {"report": path} and all(set(line) == {"done", "total", "note"} for line in lines[:-1])
    assert _report(spec, path)["digest"] == expected["digest"]


def test_a_checkpoint_of_other_inputs_or_a_damaged_one_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_checkpoint(tmp_path, "one", {"step": 3})
    assert load_checkpoint(tmp_path, "other") is None and "other inputs" in caplog.text
    found = load_checkpoint(tmp_path, "one")
    assert found is not None and found["step"] == 3
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    assert load_checkpoint(tmp_path, "one") is None and "cannot be read" in caplog.text


def test_a_loss_that_is_no_number_stops_with_its_step(make_spec: Make, config: PretrainConfig):
    optim = config.optim.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d of 6 .* lower the learning rate \(1e\+30\)"):
        train_fourm(make_spec(config=config.model_copy(update={"optim": optim})), no_progress)


def test_a_fine_tune_starts_from_published_weights(make_spec: Make, config: PretrainConfig):
    spec = make_spec()
    base = _report(spec, train_fourm(spec, no_progress))
    still = config.optim.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})
    tuned = make_spec(name="text2im", config=config.model_copy(update={"optim": still}), init_from=base["path"])
    report = _report(tuned, train_fourm(tuned, no_progress))
    store = LocalStore(spec.store)
    one, other = (load_fourm(store, r["path"]).state_dict() for r in (base, report))
    assert all(torch.equal(one[key], other[key]) for key in one)
    wider = config.model_copy(update={"model": config.model.model_copy(update={"dim": 32})})
    with pytest.raises(ModelError, match=r"cannot be fine-tuned .* dim is 16, the config says 32"):
        train_fourm(make_spec(config=wider, init_from=base["path"]), no_progress)


def test_a_model_with_wrong_files_says_what_is_wrong(make_spec: Make):
    spec = make_spec()
    folder = _report(spec, train_fourm(spec, no_progress))["path"]
    store = LocalStore(spec.store)
    weights, text = store.read(f"{folder}/model.safetensors"), store.read(f"{folder}/config.json")
    store.write(f"{folder}/model.safetensors", weights[:100])
    with pytest.raises(ModelError, match="is damaged"):
        load_fourm(store, folder)
    store.write(f"{folder}/model.safetensors", weights)
    store.write(f"{folder}/config.json", text.replace(b'"encoder_depth": 1', b'"encoder_depth": 2'))
    with pytest.raises(ModelError, match=r"encoder\.1\.attn\.proj\.weight: missing, expected \(16, 16\)"):
        load_fourm(store, folder)
    store.write(f"{folder}/config.json", text.replace(b'"patch_px": 8', b'"patch_px": 8 '))
    load_fourm(store, folder)  # the same values
    store.write(f"{folder}/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ModelError, match="weights or a config of another digest"):
        load_fourm(store, folder)
    store.write(f"{folder}/config.json", b"{}")
    with pytest.raises(ModelError, match="not a 4M config"):
        load_fourm(store, folder)
    with pytest.raises(ModelError, match="train it first"):
        load_fourm(store, "models/fourm/none")


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_the_program_refuses_a_wrong_spec(tmp_path: Path, content: str):
    from fourmill.train.__main__ import main

    (tmp_path / "spec.json").write_text(content)
    assert main(["--spec", str(tmp_path / "spec.json")]) == 2


def test_the_program_fails_with_a_missing_manifest(make_spec: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from fourmill.train.__main__ import main

    (tmp_path / "spec.json").write_text(make_spec(manifest="cc12m/manifests/no.json").model_dump_json())
    assert main(["--spec", str(tmp_path / "spec.json")]) == 1
    assert "materialize tokens/manifest" in caplog.text
