"""Two-dimensional sine-cosine positions, stored for one grid and interpolated to others."""

import torch
from torch import Tensor
from torch.nn import functional as F

_TEMPERATURE = 10_000.0


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Positions (1, dim, height, width) float32: sine and cosine of the row, then sine and cosine of the column.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"{dim} channels cannot hold four equal parts; choose a multiple of 4")
    omega = _TEMPERATURE ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = (torch.arange(height, dtype=torch.float64)[:, None] * omega).T[:, :, None].expand(-1, height, width)
    columns = (torch.arange(width, dtype=torch.float64)[:, None] * omega).T[:, None, :].expand(-1, height, width)
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()])[None].float()


def fit_positions(positions_1Dhw: Tensor, height: int, width: int) -> Tensor:
    """Positions for another grid, bicubic from the stored one.

    Computing sines anew for the smaller grid would give other tokens: a model trained at 28x28 sees 14x14 as every
    second position.
    """
    if positions_1Dhw.shape[-2:] == (height, width):
        return positions_1Dhw
    return F.interpolate(positions_1Dhw, size=(height, width), mode="bicubic", align_corners=False)
