"""Training one image tokenizer from a packed training set: the same weights however often it was killed."""

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fourmill.core.checkpoint import drop_checkpoint, load_checkpoint, save_checkpoint
from fourmill.core.process import prepare_torch
from fourmill.core.ranks import ALONE, Ranks, join_ranks, require_ranks
from fourmill.core.store import Store, open_store
from fourmill.core.work import Progress, no_progress
from fourmill.tokenize.batches import Ahead, Batches
from fourmill.tokenize.config import ImageTokenizerConfig
from fourmill.tokenize.guard import TrainingError
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.journal import Journal
from fourmill.tokenize.load import load_image_tokenizer
from fourmill.tokenize.report import publish, report_path
from fourmill.tokenize.score import score_model
from fourmill.tokenize.spec import TokenizerSpec
from fourmill.tokenize.state import State, depth_span, start, uncompiled
from fourmill.tokenize.train_set import LabelArrays, read_label

_log = logging.getLogger(__name__)
_REPORT_EVERY_S = 1.0
_CURVE_POINTS = 50
# Batches made at a time: a GPU takes its rows of the paper's faster than one thread cuts them out.
_AHEAD = {"cpu": 1, "cuda": 4}


@dataclass(frozen=True)
class Figures:
    """What one step was like, over all processes."""

    loss: float
    gradient_norm: float  # before clipping
    tokens: Tensor  # codebook indices of this process's rows

    @property
    def are_finite(self) -> bool:
        """Whether the step can be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def train_tokenizer(spec: TokenizerSpec, progress: Progress) -> str:
    """Train to the end, or find that it was done before; resume from the run folder where there is a checkpoint.

    Returns:
        Store path of the report (`tokenize.report`).

    Raises:
        TrainSetError: the training set is not the one that the spec names.
        ModelError: the stage before left no tokenizer, or one of another shape.
        TrainingError: loss or gradients are no numbers any more.
        RanksError: the processes are not as many as the spec says, or do not see the same checkpoint.
    """
    store = open_store(spec.store)
    if _is_done(store, report_path(spec)):
        _log.info("%s was trained from the same inputs before: %s", spec.name, report_path(spec))
        return report_path(spec)
    prepare_torch(spec.threads, spec.config.training.precision == "bf16")
    place = (spec.processes, spec.name, "fourmill.tokenize")
    require_ranks(*place)
    # Before they join, since processes that have joined wait ten minutes for each other: hashing a set may take hours, and the span
    # of its depth minutes.
    labels = read_label(store, spec.train_set, spec.train_set_digest, spec.config.label)
    span = depth_span(labels, spec.config.input_px) if spec.config.label == "depth" else None
    with join_ranks(*place) as ranks:
        _train(store, spec, labels, span, ranks, progress if ranks.is_first else no_progress)
    return report_path(spec)


def _train(
    store: Store,
    spec: TokenizerSpec,
    labels: LabelArrays,
    span: tuple[float, float] | None,
    ranks: Ranks,
    progress: Progress,
) -> None:
    begun = load_image_tokenizer(store, spec.earlier[-1].path) if spec.earlier else None
    with Journal(Path(spec.run_folder) / "tensorboard", spec.config, ranks.is_first) as journal:
        training = Training(spec, Batches(labels, spec.config, ranks), ranks, progress, journal, begun, span)
        try:
            state = training.run()
        finally:
            training.close()
        if ranks.is_first:
            progress(state.step, state.step, "scoring")
            publish(store, spec, state, labels, journal)
            drop_checkpoint(Path(spec.run_folder))


def train_step(state: State, x: Tensor, config: ImageTokenizerConfig, ranks: Ranks = ALONE) -> Figures:
    """One optimiser step, or none where loss or gradient is not finite: then nothing but the step's number changes.

    Args:
        x: this process's rows of the batch of `state.draw`, as the network sees them.
    """
    training, model = config.training, state.model
    if training.cuda_graphs:
        torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the step before made is not needed any more
    codebook = model.quantize.keep()
    generator = torch.Generator().manual_seed(training.seed * 2**32 + state.draw)
    state.schedule.step_update(state.step)  # here: also after a checkpoint was gone back to
    with torch.autocast(x.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        loss, quantized = model.loss(x, generator, ranks)
    loss.backward()
    ranks.average_gradients(model.parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_grad)
    shared, length = torch.stack([ranks.mean(loss.detach()), norm]).tolist()  # the step's one wait for the device
    figures = Figures(shared, length, quantized.tokens_Bhw)
    if figures.are_finite:
        state.optimizer.step()
        state.updates += 1
        if state.ema:
            state.ema.update(model, state.updates)
    else:
        model.quantize.put_back(codebook)  # the forward pass has moved it
    state.optimizer.zero_grad(set_to_none=True)  # here, so that no forward pass has gradients beside it
    state.step += 1
    return figures


class Training:
    """One training on its way: steps, checkpoints, and the way back after steps that are no numbers."""

    def __init__(
        self,
        spec: TokenizerSpec,
        batches: Batches,
        ranks: Ranks,
        progress: Progress,
        journal: Journal,
        begun: ImageTokenizer | None,
        depth_span: tuple[float, float] | None,
    ) -> None:
        self._spec, self._batches, self._ranks, self._progress = spec, batches, ranks, progress
        self._journal, self._begun = journal, begun
        self._config, self._depth_span = spec.config, depth_span
        self._ahead = Ahead(batches, _AHEAD[ranks.device.partition(":")[0]])
        self._last_said = 0.0

    def run(self) -> State:
        """From the last checkpoint, or the start, to the last step."""
        steps = self._config.training.steps
        state = self._last_good()
        before, begun = state.seconds, time.monotonic()
        while state.step < steps:
            x = self._ahead.take(state.draw, steps - state.step - 1)
            figures = train_step(state, x, self._config, self._ranks)
            state.seconds = before + time.monotonic() - begun
            advice = state.guard.advice(figures.are_finite, self._config.training.guard)
            if advice == "stop":
                raise self._error(state, figures)
            if advice == "go back":
                state = self._go_back(state, figures)
                continue
            self._keep(state, figures)
        return state

    def close(self) -> None:
        """End the threads that make batches."""
        self._ahead.close()

    def _last_good(self) -> State:
        """The last checkpoint's state; the one before the first step where there is none."""
        state = start(self._config, self._batches.labels, self._ranks.device, self._begun, self._depth_span)
        snapshot = load_checkpoint(Path(self._spec.run_folder), self._spec.input_digest)
        if snapshot is not None:
            state.restore(snapshot)
            _log.info("resumed at step %d", state.step)
        self._ranks.check_alike(state.step, self._spec.name, self._spec.run_folder)
        self._journal.open(state.step)
        return state

    def _go_back(self, failed: State, figures: Figures) -> State:
        state = self._last_good()
        state.guard = failed.guard.gone_back(failed.step - state.step)
        state.seconds = failed.seconds
        _log.warning(
            "%s: loss %s, gradient norm %s at step %d, the %d. step in a row that is no number; back to step %d, other batches",
            *(self._spec.name, figures.loss, figures.gradient_norm, failed.step, failed.guard.in_row, state.step),
        )
        return state

    def _keep(self, state: State, figures: Figures) -> None:
        """Note the step where the curve, a checkpoint or a listener wants it."""
        training = self._config.training
        ended = state.step == training.steps
        if (state.step % max(1, training.steps // _CURVE_POINTS) == 0 or ended) and figures.are_finite:
            state.curve.append([state.step, round(figures.loss, 5)])
        tokens = figures.tokens if figures.are_finite else None
        self._journal.note(state, figures.loss, figures.gradient_norm, tokens)
        if training.score_every and state.step % training.score_every == 0 and not ended:
            with self._ranks.first_alone(f"score {state.draw}") as is_first:
                if is_first:
                    self._score(state)
        # Not amid skipped steps: it is what a training goes back to.
        if state.step % training.checkpoint_every == 0 and not ended and figures.are_finite and self._ranks.is_first:
            self._journal.flush()  # before the checkpoint: a resumed training writes what comes after it
            save_checkpoint(Path(self._spec.run_folder), self._spec.input_digest, state.snapshot())
        if ended or time.monotonic() - self._last_said >= _REPORT_EVERY_S:
            self._last_said = time.monotonic()
            skipped = f", {state.guard.skipped} skipped" if state.guard.skipped else ""
            self._progress(state.step, training.steps, f"loss {figures.loss:.4f}{skipped}")

    def _score(self, state: State) -> None:
        """Figures and pictures of the held-out samples, amid the training."""
        with uncompiled(self._config.training):
            scored = score_model(state.published, self._batches.labels, self._config.label)
        self._journal.score(state.step, scored)

    def _error(self, state: State, figures: Figures) -> TrainingError:
        training, guard = self._config.training, state.guard
        return TrainingError(
            f"{self._spec.name}: loss {figures.loss} and gradient norm {figures.gradient_norm} at step {state.step} of "
            f"{training.steps}, as in the {guard.in_row - 1} before; {guard.skipped} steps were skipped in all and the training "
            f"went back {guard.rollbacks} times. Lower the learning rate ({training.learning_rate:g}), train in fp32, or look "
            f"for values that are no numbers in the training set {self._spec.train_set}"
        )


def _is_done(store: Store, path: str) -> bool:
    if not store.exists(path):
        return False
    report = json.loads(store.read(path))
    return store.exists(f"{report['path']}/model.safetensors") and store.exists(report["preview"])
