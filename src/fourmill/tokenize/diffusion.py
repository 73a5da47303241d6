"""The noise schedule of the diffusion decoders and their sampler: linear betas, zero terminal SNR, x0 prediction, DDIM.

Denoising Diffusion Implicit Models with eta 0 and "trailing" steps, so that sampling starts from pure noise, as
training's last step is (the schedule is rescaled to it).
"""

# B batch, C channels, H W pixels, T steps of the schedule

from collections.abc import Callable

import torch
from torch import Tensor

_FIRST_BETA, _LAST_BETA = 1e-4, 0.02


def signal_levels(num_steps: int) -> Tensor:
    """Share of signal variance left at each step (alphas_cumprod), (T,) float32; 0 at the last step.

    Raises:
        ValueError: less than two steps, the first and the last.
    """
    if num_steps < 2:
        raise ValueError(
            f"a noise schedule of {num_steps} steps, expected at least 2: the first keeps signal, the last none"
        )
    betas = torch.linspace(_FIRST_BETA, _LAST_BETA, num_steps, dtype=torch.float64)
    root = (1 - betas).cumprod(0).sqrt()
    # Shift so that the last level is 0, scale so that the first stays.
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (root**2).float()


def trailing_steps(num_steps: int, sample_steps: int) -> list[int]:
    """Steps that sampling visits, from the last one down: 50 of 1000 are 999, 979, ..., 19.

    Raises:
        ValueError: none, or more than the schedule has.
    """
    if not 0 < sample_steps <= num_steps:
        raise ValueError(f"{sample_steps} sampling steps, expected 1..{num_steps}: the schedule has {num_steps}")
    return [round(num_steps - i * num_steps / sample_steps) - 1 for i in range(sample_steps)]


def add_noise(clean_BCHW: Tensor, noise_BCHW: Tensor, level_B: Tensor) -> Tensor:
    """The image at a signal level: sqrt(level) * clean + sqrt(1 - level) * noise."""
    level = level_B.view(-1, 1, 1, 1)
    return level.sqrt() * clean_BCHW + (1 - level).sqrt() * noise_BCHW


@torch.no_grad()
def sample_ddim(
    predict_clean: Callable[[Tensor, Tensor], Tensor],
    noise_BCHW: Tensor,
    levels_T: Tensor,
    sample_steps: int,
    clamp: bool,
) -> Tensor:
    """Denoise from pure noise.

    Args:
        predict_clean: (noised image, steps (B,)) to clean image.
        noise_BCHW: standard normal noise to start from.
        levels_T: from `signal_levels`.
        clamp: keep the prediction in [-1, 1].

    Returns:
        The image, float32.

    Raises:
        ValueError: sampling steps of none, or of more than there are levels.
    """
    steps = trailing_steps(len(levels_T), sample_steps)
    x = noise_BCHW
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        predicted = predict_clean(x, torch.full((len(x),), step, device=x.device)).float()
        clean = predicted.clamp(-1, 1) if clamp else predicted
        if following is None:
            return clean
        level, next_level = levels_T[step], levels_T[following]
        # Of the prediction as it is, as the public sampler (diffusers) has it: clamping it first gives other images.
        noise = (x - level.sqrt() * predicted) / (1 - level).sqrt()
        x = next_level.sqrt() * clean + (1 - next_level).sqrt() * noise
    return x
