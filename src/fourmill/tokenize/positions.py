"""Two-dimensional sine-cosine positions, stored for one grid and interpolated to others."""

from torch import Tensor
from torch.nn import functional as F

from fourmill.core.positions import grid_positions


def stored_positions(dim: int, grid: int) -> Tensor:
    """Positions of a square grid as tokenizers store them, (1, dim, grid, grid) float32."""
    return grid_positions(dim, grid).transpose(1, 2).unflatten(2, (grid, grid)).contiguous()


def fit_positions(positions_1Dhw: Tensor, height: int, width: int) -> Tensor:
    """Positions for another grid, bicubic from the stored one.

    Computing sines anew for the smaller grid would give other tokens: a model trained at 28x28 sees 14x14 as every
    second position.
    """
    if positions_1Dhw.shape[-2:] == (height, width):
        return positions_1Dhw
    return F.interpolate(positions_1Dhw, size=(height, width), mode="bicubic", align_corners=False)
