"""Training 4M from a manifest: resumable, and the same weights however often it was killed."""

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fourmill.core.checkpoint import drop_checkpoint, load_checkpoint, save_checkpoint
from fourmill.core.flow import ahead
from fourmill.core.manifest import Manifest
from fourmill.core.process import prepare_torch
from fourmill.core.ranks import ALONE, Ranks, join_ranks
from fourmill.core.store import Store, open_store
from fourmill.core.work import Progress, no_progress
from fourmill.train.batch import Batch
from fourmill.train.config import PretrainConfig, TrainSpec
from fourmill.train.data import Loader, checked_manifest, read_samples
from fourmill.train.finetune import start_from
from fourmill.train.load import load_fourm
from fourmill.train.masking import Mixture, taking_part
from fourmill.train.model import FourM
from fourmill.train.optim import AdamW, Average, learning_rate
from fourmill.train.report import Trained, is_done, publish, report_path
from fourmill.train.validate import validation_losses

_log = logging.getLogger(__name__)
_REPORT_EVERY_S = 1.0
_CURVE_POINTS = 50


class TrainingError(RuntimeError):
    """A training that cannot go on: where it stood, and what to change."""


@dataclass
class State:
    """All that a step changes."""

    model: FourM
    optimizer: AdamW
    average: Average
    step: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)  # [step, mean loss of the steps since the point before]
    losses: list[float] = field(default_factory=list)  # of those steps


def train_fourm(spec: TrainSpec, progress: Progress) -> str:
    """Train to the end, or find that it was done before; resume from the run folder where there is a checkpoint.

    Returns:
        Store path of the report (`train.report`).

    Raises:
        DataError: manifest or shards are not what they were.
        TrainingError: the loss is no number any more.
        RanksError: the processes are not as many as the spec says.
        ModelError: the weights to start from do not fit.
    """
    store = open_store(spec.store)
    if is_done(store, report_path(spec)):
        _log.info("%s was trained from the same inputs before: %s", spec.name, report_path(spec))
        return report_path(spec)
    prepare_torch(spec.threads, spec.config.precision == "bf16")
    with join_ranks(spec.processes, spec.name, "fourmill.train") as ranks:
        _train(store, spec, ranks, progress if ranks.is_first else no_progress)
    return report_path(spec)


def _train(store: Store, spec: TrainSpec, ranks: Ranks, progress: Progress) -> None:
    config, manifest = spec.config, checked_manifest(store, spec.manifest)
    rows = ranks.rows(config.batch_size)
    state = start(store, manifest, config, spec.init_from, ranks.device)
    _resume(state, load_checkpoint(Path(spec.run_folder), spec.input_digest))
    ranks.check_alike(state.step, spec.name, spec.run_folder)
    mixture = Mixture(config.masking, state.model.modalities)
    train = read_samples(store, manifest, "train", modalities=state.model.modalities)
    loader = Loader(train, mixture, config.batch_size, config.seed, manifest.patch_px, rows)
    _run(state, loader, spec, ranks, progress)
    if not ranks.is_first:
        return
    progress(state.step, state.step, "scoring")
    publish_average(state)
    val = read_samples(store, manifest, "val", config.num_val, state.model.modalities)
    losses = validation_losses(state.model.eval(), val, mixture, config)
    trained = Trained(state.step, state.seconds, state.curve, len(train), len(val), losses)
    publish(store, spec, manifest, state.model, trained)
    drop_checkpoint(Path(spec.run_folder))


def start(
    store: Store, manifest: Manifest, config: PretrainConfig, init_from: str | None = None, device: str = "cpu"
) -> State:
    """Weights and optimiser before the first step.

    Raises:
        ModelError: the model to start from has another shape, or another idea of a modality.
        MaskingError: the mixture does not fit the modalities.
    """
    modalities = taking_part(config.masking, manifest.at(config.resolutions))
    torch.manual_seed(config.seed)
    model = FourM(config.model, modalities, manifest.patch_px, Mixture(config.masking, modalities).predicted)
    if init_from is not None:
        start_from(model, load_fourm(store, init_from), config.copy_tables, init_from)
    model.to(device)
    average = Average(dict(model.named_parameters()), config.optim.average_decay)
    return State(model.train(), AdamW(model, config.optim), average)


def train_step(state: State, batch: Batch, config: PretrainConfig, ranks: Ranks = ALONE) -> dict[str, float]:
    """One optimiser step.

    Args:
        batch: this process's rows of it.

    Returns:
        The loss as `loss`, and each modality's by name, in nats.

    Raises:
        TrainingError: the loss is no number.
    """
    with autocast(state.model, config):
        loss, by_modality = state.model.loss(batch)
    found = {
        "loss": float(ranks.mean(loss.detach())),
        **{name: float(value.detach()) for name, value in by_modality.items()},
    }
    if not math.isfinite(found["loss"]):
        bad = [name for name, value in found.items() if name != "loss" and not math.isfinite(value)]
        raise TrainingError(
            f"the loss is {found['loss']} at step {state.step} of {config.steps} ({', '.join(bad)}); lower the learning rate "
            f"({config.optim.learning_rate:g}), bound the gradient (optim.clip_grad) or train in fp32"
        )
    state.optimizer.zero_grad()
    loss.backward()
    ranks.average_gradients(state.model.parameters())
    if config.optim.clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.clip_grad)
    state.optimizer.step(learning_rate(config.optim, config.steps, state.step))
    state.step += 1
    state.average.update(state.model.parameters(), state.step)
    return found


def autocast(model: FourM, config: PretrainConfig) -> torch.autocast:
    """The precision that a config asks for, on the model's device."""
    return torch.autocast(model.mask_token.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def publish_average(state: State) -> None:
    """Let the averaged weights take the place of the last ones, where there is an average."""
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            if name in state.average.values:
                parameter.copy_(state.average.values[name])


def _run(state: State, loader: Loader, spec: TrainSpec, ranks: Ranks, progress: Progress) -> None:
    config, before, begun, last = spec.config, state.seconds, time.monotonic(), 0.0
    every = max(1, config.steps // _CURVE_POINTS)
    with ThreadPoolExecutor(1, "loader") as threads:  # a batch is made while the one before is trained on
        for batch in ahead(threads, loader.batch, range(state.step, config.steps), 2):
            found = train_step(state, batch, config, ranks)
            state.seconds = before + time.monotonic() - begun
            state.losses.append(found["loss"])
            ended = state.step == config.steps
            if state.step % every == 0 or ended:
                state.curve.append([state.step, round(sum(state.losses) / len(state.losses), 5)])
                state.losses = []
            if ranks.is_first and not ended and state.step % config.checkpoint_every == 0:
                save_checkpoint(Path(spec.run_folder), spec.input_digest, _snapshot(state, spec))
            if ended or time.monotonic() - last >= _REPORT_EVERY_S:
                last = time.monotonic()
                progress(state.step, config.steps, f"loss {found['loss']:.3f}")


def _snapshot(state: State, spec: TrainSpec) -> dict[str, Any]:
    return {
        "spec": spec.model_dump_json(),  # manifest, seed and config: for whoever finds the file
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "average": state.average.values,
        "step": state.step,
        "seconds": state.seconds,
        "curve": state.curve,
        "losses": state.losses,
    }


def _resume(state: State, snapshot: dict[str, Any] | None) -> None:
    if snapshot is None:
        return
    state.model.load_state_dict(snapshot["model"])
    state.optimizer.load_state_dict(snapshot["optimizer"])
    for name, value in snapshot["average"].items():
        state.average.values[name].copy_(value)
    state.step, state.seconds = snapshot["step"], snapshot["seconds"]
    state.curve, state.losses = snapshot["curve"], snapshot["losses"]
    _log.info("resumed at step %d", state.step)
