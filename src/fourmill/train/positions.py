"""Sine-cosine positions of image grids and of texts, laid out as the public 4M's. D channels, G tokens along a side."""

import torch

TEXT_POSITIONS = 512  # rows of the public table; only the first 256 are ever looked up


def grid_positions(dim: int, grid: int, temperature: float = 10_000.0, centred: bool = False) -> torch.Tensor:
    """Positions of a square grid: sine and cosine of the row, then of the column.

    Args:
        dim: channels D, a multiple of 4.
        grid: tokens along a side, G.
        temperature: ratio of the longest to the shortest wave.
        centred: subtract the mean over the grid, so that places differ by more than a common vector.

    Returns:
        (1, G * G, D) float32; token row * G + column.
    """
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    table = torch.cat([_waves(axis.flatten(), dim // 2, temperature) for axis in (rows, columns)], 1)
    if centred:
        table = table - table.mean(0, keepdim=True)
    return table.float()[None]


def text_positions(dim: int) -> torch.Tensor:
    """Positions in a text, (1, 512, D) float32."""
    return _waves(torch.arange(TEXT_POSITIONS), dim, 10_000.0).float()[None]


def _waves(places: torch.Tensor, dim: int, temperature: float) -> torch.Tensor:
    half = dim // 2
    omega = temperature ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = places.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1)
