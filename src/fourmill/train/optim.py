"""AdamW, its two groups, its schedule, and the moving average of weights (Table 4; public optimiser groups)."""

import math
from collections.abc import Iterable, Mapping

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


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on norms and biases; embeddings decay, as public."""
    parameters = dict(model.named_parameters())
    plain = [p for name, p in parameters.items() if is_plain(name)]
    decayed = [p for name, p in parameters.items() if not is_plain(name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)


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
