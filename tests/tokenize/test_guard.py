"""Non-finite steps, made by training sets that hold non-finite values and by weights that are none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fourmill.core.digest import digest_bytes
from fourmill.core.order import batch_indices
from fourmill.core.ranks import ALONE
from fourmill.core.store import LocalStore, Store
from fourmill.core.work import no_progress
from fourmill.tokenize import journal, train
from fourmill.tokenize.batches import Batches
from fourmill.tokenize.config import GuardConfig
from fourmill.tokenize.guard import Guard, TrainingError
from fourmill.tokenize.spec import TokenizerSpec
from fourmill.tokenize.state import State, start
from fourmill.tokenize.train import train_step, train_tokenizer
from fourmill.tokenize.train_set import TrainSet, read_label

NUM_TRAIN, BATCH = 30, 8


class _KilledError(Exception):
    pass


@pytest.fixture
def damage(store: Store, train_set: TrainSet) -> Callable[[TokenizerSpec, list[int]], TokenizerSpec]:
    """The spec with a training set in which the CLIP features of some samples are infinite."""

    def damaged(spec: TokenizerSpec, samples: list[int]) -> TokenizerSpec:
        arrays = dict(load(store.read(train_set.path)))
        features = arrays["train/clip"].copy()
        features[samples, 0, 0] = np.inf
        data = save(arrays | {"train/clip": features})
        digest = digest_bytes(data)
        store.write(f"damaged/{digest}.safetensors", data)
        return spec.model_copy(update={"train_set": f"damaged/{digest}.safetensors", "train_set_digest": digest})

    return damaged


def _state(spec: TokenizerSpec, store: Store) -> tuple[State, Batches]:
    labels = read_label(store, spec.train_set, spec.train_set_digest, spec.config.label)
    return start(spec.config, labels, ALONE.device), Batches(labels, spec.config)


def test_a_step_is_taken_with_gradients_no_longer_than_the_bound(spec: Any, store: Store) -> None:
    one = spec("clip", clip_grad=1e-3)
    state, batches = _state(one, store)
    taken: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        taken.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    state.optimizer.register_step_pre_hook(note)
    figures = train_step(state, batches(state.draw), one.config)
    assert figures.gradient_norm > 1e-2 and taken == [pytest.approx(1e-3, rel=1e-3)]


def _values(state: State) -> dict[str, torch.Tensor]:
    """Everything that a step may change, flat."""
    snapshot = state.snapshot()
    momentum = {
        f"optimizer.{i}.{name}": value
        for i, found in snapshot["optimizer"]["state"].items()
        for name, value in found.items()
    }
    model = {f"model.{k}": v for k, v in snapshot["model"].items()}
    return {
        k: v.clone() for k, v in {**model, **{f"ema.{k}": v for k, v in snapshot["ema"].items()}, **momentum}.items()
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_no_number_changes_its_number_only(spec, store, value, first):
    one = spec("clip", ema_decay=0.9)
    state, batches = _state(one, store)
    if not first:  # else not even the codebook has its start
        train_step(state, batches(0), one.config)
    before, step = _values(state), state.step
    x = batches(1)
    x[0, 0] = value
    assert not train_step(state, x, one.config).are_finite
    after = _values(state)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert state.step == step + 1 and state.updates == step
    assert train_step(state, batches(2), one.config).are_finite
    assert not torch.equal(_values(state)["model.quantize._codebook.embed"], before["model.quantize._codebook.embed"])


def test_a_bad_sample_costs_the_steps_that_see_it_and_no_more(spec, damage, read_report, monkeypatch):
    monkeypatch.setattr(journal, "USAGE_WINDOW", BATCH * 64)  # tokens of one step
    one = damage(spec("clip", steps=10), [batch_indices(NUM_TRAIN, BATCH, 0, 1)[2]])
    bad = [s for s in range(10) if batch_indices(NUM_TRAIN, BATCH, 0, 1)[2] in batch_indices(NUM_TRAIN, BATCH, 0, s)]
    report = read_report(train_tokenizer(one, no_progress))
    assert report["steps"] == 10 and report["skipped_steps"] == len(bad) >= 2 and report["rollbacks"] == 0
    taken = [s + 1 for s in range(10) if s not in bad]
    assert [step for step, _ in report["curve"]] == taken
    log = EventAccumulator(report["tensorboard"]).Reload()
    assert [event.step for event in log.Scalars("train/codebook_usage")] == taken
    assert np.isfinite(list(report["figures"].values())).all()


def test_after_several_in_a_row_it_goes_back_and_on_with_other_batches_and_so_does_a_resumed_one(
    spec, damage, read_report, store, monkeypatch
):
    monkeypatch.setattr(train, "_REPORT_EVERY_S", 0)
    guard = GuardConfig(max_in_row=2)
    samples = [batch_indices(NUM_TRAIN, BATCH, 0, draw)[0] for draw in (4, 5)]

    def one(folder: str) -> TokenizerSpec:
        return damage(spec("clip", folder=folder, steps=10, checkpoint_every=2, guard=guard), samples)

    first = read_report(train_tokenizer(one("whole"), no_progress))
    assert first["rollbacks"] >= 1 and first["steps"] == 10
    assert [step for step, _ in first["curve"]] == sorted({step for step, _ in first["curve"]})
    again = one("again")
    LocalStore(again.store).delete(f"models/tok_clip/trained/{again.input_digest}/report.json")

    def kill(done: int, total: int, note: str) -> None:
        if done >= 3 and "skipped" in note:
            raise _KilledError

    with pytest.raises(_KilledError):
        train_tokenizer(again, kill)
    second = read_report(train_tokenizer(again, no_progress))
    for name in ("digest", "curve", "skipped_steps", "rollbacks"):
        assert second[name] == first[name]


def test_weights_that_are_no_numbers_are_those_of_the_last_checkpoint_again(spec, store, monkeypatch, read_report):
    one = spec("clip", steps=8, checkpoint_every=2, guard=GuardConfig(max_in_row=2))
    plain = train.train_step

    def broken_at(state: State, *rest: Any) -> train.Figures:
        if state.step == 5 and state.guard.rollbacks == 0:
            with torch.no_grad():
                state.model.quant_proj.weight[0, 0] = torch.nan
        return plain(state, *rest)

    monkeypatch.setattr(train, "train_step", broken_at)
    report = read_report(train_tokenizer(one, no_progress))
    assert (report["rollbacks"], report["skipped_steps"], report["steps"]) == (1, 2, 8)


def test_it_stops_with_advice_when_going_back_does_not_help(spec, damage):
    guard = GuardConfig(max_in_row=2, max_rollbacks=1)
    one = damage(spec("clip", steps=20, guard=guard), list(range(NUM_TRAIN)))
    with pytest.raises(
        TrainingError, match=r"4 steps were skipped in all and the training went back 1 times\. Lower the lea"
    ):
        train_tokenizer(one, no_progress)


def test_the_guard_counts_steps_in_a_row():
    guard, config = Guard(), GuardConfig(max_in_row=2, max_rollbacks=1)
    assert [guard.advice(f, config) for f in (False, True, False, False)] == ["go on", "go on", "go on", "go back"]
    again = guard.gone_back(steps=3)
    assert again == replace(guard, in_row=0, rollbacks=1, moved_on=3)
    assert [again.advice(False, config) for _ in range(2)] == ["go on", "stop"]
    assert Guard.of(again.snapshot()) == again


def test_what_the_guard_has_counted_is_kept_with_the_state(spec: Any, store: Store) -> None:
    state, _ = _state(spec("clip"), store)
    state.guard = Guard(skipped=3, in_row=2, rollbacks=1, moved_on=4)
    fresh, _ = _state(spec("clip"), store)
    fresh.restore(state.snapshot())
    assert fresh.guard == state.guard and fresh.draw == state.draw
