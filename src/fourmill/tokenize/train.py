"""Training one image tokenizer from a packed training set: the same weights however often it was killed."""

import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fourmill.core.checkpoint import drop_checkpoint, load_checkpoint, save_checkpoint
from fourmill.core.metrics import codebook_use, standardise_depth
from fourmill.core.program import be_deterministic
from fourmill.core.store import Store, open_store
from fourmill.core.work import Progress
from fourmill.tokenize.batches import batch_flips, batch_indices
from fourmill.tokenize.config import ImageTokenizerConfig, TokenizerSpec, TrainingConfig
from fourmill.tokenize.conversions import mirror, to_network
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import save_image_tokenizer
from fourmill.tokenize.preview import preview_png
from fourmill.tokenize.score import HEADLINES, baseline_map, figures
from fourmill.tokenize.train_set import LabelArrays, read_label, unpack

_log = logging.getLogger(__name__)
_REPORT_EVERY_S = 1.0
_CURVE_POINTS = 50


class TrainingError(RuntimeError):
    """A training that cannot go on: where it stood, and what to change."""


@dataclass
class _State:
    """All that a step changes."""

    model: ImageTokenizer
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)  # [step, loss] now and then


def train_tokenizer(spec: TokenizerSpec, progress: Progress) -> str:
    """Train to the end, or find that it was done before; resume from the run folder where there is a checkpoint.

    Returns:
        Store path of the report: digest, path, figures, baseline, usage, perplexity, steps, seconds, preview.

    Raises:
        TrainSetError: the training set is not the one that the spec names.
        TrainingError: the loss is no number any more.
    """
    store = open_store(spec.store)
    report_path = f"models/{spec.name}/trained/{spec.input_digest}/report.json"
    if _is_done(store, report_path):
        _log.info("%s was trained from the same inputs before: %s", spec.name, report_path)
        return report_path
    be_deterministic(spec.threads)
    labels = read_label(store, spec.train_set, spec.train_set_digest, spec.config.label)
    folder = Path(spec.run_folder)
    state = _start(spec.config, labels)
    _resume(state, load_checkpoint(folder, spec.input_digest))
    _run(state, labels, spec, folder, progress)
    progress(state.step, state.step, "scoring")
    _publish(store, spec, state, labels, report_path)
    drop_checkpoint(folder)
    return report_path


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Linear warm-up to the peak, then cosine decay to 0 (Table 3)."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    share = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def train_step(state: _State, labels: LabelArrays, config: ImageTokenizerConfig) -> torch.Tensor:
    """One optimiser step; a function of the state, and of (seed, step) for all that is drawn. Returns the loss."""
    training = config.training
    indices = batch_indices(len(labels.train), training.batch_size, training.seed, state.step)
    batch = unpack(labels.train[indices], config.label)
    if training.hflip:
        batch = mirror(batch, batch_flips(len(indices), training.seed, state.step), config.label)
    x = to_network(batch, config.label)
    generator = torch.Generator().manual_seed(training.seed * 2**32 + state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(training, state.step)
    with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16"):
        loss, _ = state.model.loss(x, generator)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), training.clip_grad)
    state.optimizer.step()
    state.step += 1
    return loss.detach()


def _start(config: ImageTokenizerConfig, labels: LabelArrays) -> _State:
    torch.manual_seed(config.training.seed)
    model = ImageTokenizer(config, _depth_span(labels)) if config.label == "depth" else ImageTokenizer(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.training.learning_rate, betas=config.training.betas, fused=True)
    return _State(model.train(), optimizer)


def _depth_span(labels: LabelArrays) -> tuple[float, float]:
    """Least and largest standardised depth of the training set, in parts so that it need not be unpacked at once."""
    parts = [standardise_depth(unpack(labels.train[i : i + 256], "depth")) for i in range(0, len(labels.train), 256)]
    return round(float(min(p.min() for p in parts)), 3), round(float(max(p.max() for p in parts)), 3)


def _run(state: _State, labels: LabelArrays, spec: TokenizerSpec, folder: Path, progress: Progress) -> None:
    training = spec.config.training
    before, start, last = state.seconds, time.monotonic(), 0.0
    while state.step < training.steps:
        loss = train_step(state, labels, spec.config)
        state.seconds = before + time.monotonic() - start
        ended = state.step == training.steps
        keep = state.step % training.checkpoint_every == 0 and not ended
        if state.step % max(1, training.steps // _CURVE_POINTS) == 0 or ended:
            state.curve.append([state.step, round(float(loss), 5)])
        if keep or ended or time.monotonic() - last >= _REPORT_EVERY_S:
            last = time.monotonic()
            _check_finite(spec, state.step, float(loss))
            if keep:
                save_checkpoint(folder, spec.input_digest, _snapshot(state))
            progress(state.step, training.steps, f"loss {float(loss):.4f}")


def _check_finite(spec: TokenizerSpec, step: int, loss: float) -> None:
    if not math.isfinite(loss):
        training = spec.config.training
        raise TrainingError(
            f"{spec.name}: loss is {loss} at step {step} of {training.steps}; lower the learning rate "
            f"({training.learning_rate:g}) or train in fp32"
        )


def _snapshot(state: _State) -> dict[str, Any]:
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "curve": state.curve,
    }


def _resume(state: _State, snapshot: dict[str, Any] | None) -> None:
    if snapshot is None:
        return
    state.model.load_state_dict(snapshot["model"])
    state.optimizer.load_state_dict(snapshot["optimizer"])
    state.step, state.seconds, state.curve = snapshot["step"], snapshot["seconds"], snapshot["curve"]
    _log.info("resumed at step %d", state.step)


def _is_done(store: Store, report_path: str) -> bool:
    if not store.exists(report_path):
        return False
    report = json.loads(store.read(report_path))
    return store.exists(f"{report['path']}/model.safetensors") and store.exists(report["preview"])


def _publish(store: Store, spec: TokenizerSpec, state: _State, labels: LabelArrays, report_path: str) -> None:
    label, model = spec.config.label, state.model.eval()
    true = unpack(labels.eval, label)
    tokens = model.tokenize(true)
    predicted = model.detokenize(tokens)
    use = codebook_use(tokens, spec.config.codebook_size)
    baseline = np.broadcast_to(baseline_map(label, unpack(labels.train, label)), true.shape)
    report: dict[str, Any] = {
        "name": spec.name,
        "label": label,
        "figures": figures(label, predicted, true, labels.eval_semseg),
        "baseline": figures(label, baseline, true, labels.eval_semseg),
        "usage": round(use.usage, 4),
        "perplexity": round(use.perplexity, 1),
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "train_set": spec.train_set_digest,
        "num_train": len(labels.train),
        "num_eval": len(labels.eval),
        "curve": state.curve,
    }
    name, better = HEADLINES[label]
    figure, easy = report["figures"][name], report["baseline"][name]
    report["headline"] = {"name": name, "value": figure, "baseline": easy, "better": better}
    digest, folder = save_image_tokenizer(store, spec.name, model, _card(spec, report))
    preview = report_path.replace("report.json", "preview.png")
    store.write(preview, preview_png(label, true, predicted))
    report |= {"digest": digest, "path": folder, "preview": preview}
    store.write(report_path, json.dumps(report, indent=1).encode())


def _card(spec: TokenizerSpec, report: dict[str, Any]) -> str:
    config = spec.config
    rows = [f"| {name} | {value} | {report['baseline'][name]} |" for name, value in report["figures"].items()]
    return "\n".join(
        [
            f"# {spec.name}",
            "",
            f"Tokenizer of {config.label}: {config.input_px} pixel crops to {config.grid} x {config.grid} tokens of "
            f"{config.codebook_size} codewords. Encoder {config.encoder.kind}, decoder {config.decoder.kind}.",
            "",
            "- digest of weights and config: {digest}",
            f"- training set: {spec.train_set_digest} ({report['num_train']} samples, {report['num_eval']} held out)",
            f"- trained for {report['steps']} steps of {config.training.batch_size}",
            f"- codebook in use on held-out samples: {report['usage']:.0%}, perplexity {report['perplexity']}",
            "",
            "| held out | reconstruction | mean or most common map |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
