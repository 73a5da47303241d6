"""Seeded networks that see something: small random ones answer nearly the same number everywhere until they are tuned."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROBE_PX = 128


def probe(px: int = PROBE_PX, num: int = 2) -> Tensor:
    """Images to tune a seeded network on: blots of several sizes, (num, 3, px, px) in [0, 1]."""
    layers = [F.interpolate(torch.randn(num, 3, side, side), px, mode="bicubic") for side in (2, 5, 11, 32)]
    return (torch.stack(layers).sum(0) * 0.25 + 0.5).clamp(0, 1)


def last_inputs(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """What went into a layer the last time that it was called during `run`."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        run()
    hook.remove()
    return seen[-1]


def spread_last(layer: nn.Conv2d | nn.Linear, inputs: Tensor, mean: float | Tensor, deviation: float) -> None:
    """Set a last layer's scale and offset so that each of its outputs has this mean and deviation over `inputs`.

    Small random networks answer nearly the same number everywhere; a seeded one must show that it sees something.
    """
    with torch.no_grad():
        output = layer(inputs)
        channels = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
        channels = channels.reshape(-1, channels.shape[-1])
        scale = deviation / channels.std(0).clamp_min(1e-12)
        offset = 0.0 if layer.bias is None else layer.bias
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.copy_(mean - (channels.mean(0) - offset) * scale)
