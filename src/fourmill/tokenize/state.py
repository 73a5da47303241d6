"""All that a step of a tokenizer's training changes, and its way into a checkpoint and back."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3

from fourmill.core.metrics import standardise_depth
from fourmill.tokenize.config import ImageTokenizerConfig, TrainingConfig
from fourmill.tokenize.guard import Guard
from fourmill.tokenize.image_tokenizer import ImageTokenizer
from fourmill.tokenize.load import ModelError
from fourmill.tokenize.train_set import LabelArrays, centre_squares
from fourmill.tokenize.vit import VitDecoder

_EMA_WARMUP = 10.0  # the average's decay is n / (n + 10) after n steps, until it reaches its own: early weights fade
_SPAN_OF = 65_536  # depth maps whose span is taken; of more, as many evenly spread


@dataclass
class State:
    """What a step changes."""

    model: ImageTokenizer
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler  # keeps nothing: a rate follows from its step, so checkpoints do not hold it
    ema: ModelEmaV3 | None
    guard: Guard = field(default_factory=Guard)
    step: int = 0  # taken or skipped
    updates: int = 0  # of the weights
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)  # [step, loss] now and then

    @property
    def draw(self) -> int:
        """Number of the batch that the next step sees: all that is drawn for it follows from (seed, draw)."""
        return self.step + self.guard.moved_on

    @property
    def learning_rate(self) -> float:
        """Of the step that is, or was last, taken."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def published(self) -> ImageTokenizer:
        """The weights that serve when the training has ended: their average, where there is one."""
        averaged = self.ema.module if self.ema else self.model
        assert isinstance(averaged, ImageTokenizer)
        return averaged

    def snapshot(self) -> dict[str, Any]:
        """The state as a checkpoint holds it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else {},
            "guard": self.guard.snapshot(),
            "step": self.step,
            "updates": self.updates,
            "seconds": self.seconds,
            "curve": self.curve,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Become what a snapshot holds, the guard's count included."""
        self.model.load_state_dict(snapshot["model"])
        self.optimizer.load_state_dict(snapshot["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(snapshot["ema"])
        self.guard = Guard.of(snapshot["guard"])
        self.step, self.updates = snapshot["step"], snapshot["updates"]
        self.seconds, self.curve = snapshot["seconds"], snapshot["curve"]


def start(
    config: ImageTokenizerConfig,
    labels: LabelArrays,
    device: str = "cpu",
    begun: ImageTokenizer | None = None,
    span: tuple[float, float] | None = None,
) -> State:
    """Weights and optimiser before the first step: a function of config, training set and what was begun.

    Args:
        begun: the tokenizer of the stage before, whose weights and codebook are gone on from; its stored positions are those of
            the same grid, and interpolated at other sides.
        span: what `depth_span` finds, where it is known already.

    Raises:
        ModelError: what was begun has other networks or another codebook.
    """
    training = config.training
    torch.manual_seed(training.seed)
    model = (
        ImageTokenizer(config, span or depth_span(labels, config.input_px))
        if config.label == "depth"
        else ImageTokenizer(config)
    )
    if begun is not None:
        if begun.config.at_stage(training) != config:
            raise ModelError(
                f"stage {training.name} of {config.label} cannot go on from a tokenizer of another shape: "
                f"{begun.config.at_stage(training).model_dump_json(exclude={'training'})} is not "
                f"{config.model_dump_json(exclude={'training'})}; train the stage before it again"
            )
        model.load_state_dict(begun.state_dict())
    model.to_device(torch.device(device)).train()
    optimizer = _adamw(model, training)
    state = State(model, optimizer, cosine(optimizer, training), _average(model, training))
    if training.compile:
        _compile(model, training)
    return state


def _compile(model: ImageTokenizer, training: TrainingConfig) -> None:
    """In place, so that names of weights stay; ViTs by their blocks, of which the first one's code serves all."""
    mode = "reduce-overhead" if training.cuda_graphs else None
    if isinstance(model.decoder, VitDecoder):
        decoder = model.decoder.blocks
    else:
        decoder = (model.decoder,)
        model.decoder.suit_compiler()
    for part in (*model.encoder.blocks, *decoder):
        part.compile(mode=mode)


def uncompiled(training: TrainingConfig) -> AbstractContextManager[None]:
    """Have a model that trains compiled compute as it is in the block: held-out samples come too rarely to compile for them."""
    return torch.compiler.set_stance("force_eager") if training.compile else nullcontext()


def _adamw(model: ImageTokenizer, training: TrainingConfig) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def cosine(optimizer: torch.optim.Optimizer, training: TrainingConfig) -> CosineLRScheduler:
    """The schedule by steps, timm's: linear warm-up to the peak, which step `warmup_steps` has, then cosine decay to 0 (Table 3).

    Args:
        optimizer: with the peak as its learning rate.
    """
    warmup = training.warmup_steps
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, training.steps - warmup),
        warmup_t=warmup,
        warmup_lr_init=training.learning_rate / (warmup + 1),  # timm's own, 0, would waste the first step
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _average(model: ImageTokenizer, training: TrainingConfig) -> ModelEmaV3 | None:
    if training.ema_decay is None:
        return None
    return ModelEmaV3(model, decay=training.ema_decay, use_warmup=True, warmup_gamma=_EMA_WARMUP, warmup_power=1.0)


def depth_span(labels: LabelArrays, input_px: int) -> tuple[float, float]:
    """Least and largest standardised depth of the training set, in parts so that it need not be unpacked at once."""
    parts = (standardise_depth(part) for part in centre_squares(labels, "depth", input_px, _SPAN_OF))
    least, largest = zip(*((part.min(), part.max()) for part in parts), strict=True)
    return round(float(min(least)), 3), round(float(max(largest)), 3)
