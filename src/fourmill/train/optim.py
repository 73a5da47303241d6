"""AdamW, its two groups, its schedule, and the moving average of weights (4M, Table 5; public optimiser groups)."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourmill.train.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int, step: int) -> float:
    """Linear warm-up to the peak, then cosine decay to 0.

    Args:
        steps: of the whole training.
        step: 0-based.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


class AdamW:
    """AdamW over two groups of parameters: one with weight decay and one without.

    Not torch.optim's, which imports the compiler on first use: four seconds in every training program. The step is the same
    fused kernel.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        named = list(model.named_parameters())
        self.betas = config.betas
        self.groups = [
            ([p for name, p in named if not is_plain(name)], config.weight_decay),
            ([p for name, p in named if is_plain(name)], 0.0),
        ]
        self.means = [[torch.zeros_like(p) for p in parameters] for parameters, _ in self.groups]
        self.squares = [[torch.zeros_like(p) for p in parameters] for parameters, _ in self.groups]
        self.num_steps = 0

    def zero_grad(self) -> None:
        """Forget gradients."""
        for parameters, _ in self.groups:
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move parameters by their gradients; one that took no part in the step has gradient zero.

        Args:
            rate: learning rate of this step.
        """
        self.num_steps += 1
        for (parameters, decay), means, squares in zip(self.groups, self.means, self.squares, strict=True):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            steps = [torch.tensor(float(self.num_steps), device=p.device) for p in parameters]
            torch.ops.aten._fused_adamw_(
                *(parameters, grads, means, squares, [], steps),
                lr=rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a step changes, parameters aside."""
        return {"means": self.means, "squares": self.squares, "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same model."""
        for own, given in ((self.means, state["means"]), (self.squares, state["squares"])):
            for mine, other in zip(own, given, strict=True):
                for tensor, value in zip(mine, other, strict=True):
                    tensor.copy_(value)
        self.num_steps = state["num_steps"]


def is_plain(name: str) -> bool:
    """Whether a parameter is spared weight decay, by its name."""
    *owners, last = name.split(".")
    return last == "bias" or any(owner.startswith("norm") or owner.endswith("norm") for owner in owners)


class Average:
    """Exponential moving average of parameters, warmed up so that early weights fade."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()} if decay else {}

    def update(self, parameters: Iterable[Tensor], step: int) -> None:
        """Move towards the parameters after a step (1-based)."""
        if self.decay:
            weight = 1 - min(self.decay, step / (step + 10))
            with torch.no_grad():
                for value, parameter in zip(self.values.values(), parameters, strict=True):
                    value.lerp_(parameter, weight)
