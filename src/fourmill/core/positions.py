"""Sine-cosine positions of image grids and of texts, laid out as the public 4M's and its tokenizers'. D channels, G tokens along a side."""

import torch

TEXT_POSITIONS = 512  # rows of the public table; only the first 256 are ever looked up


def grid_positions(
    dim: int, grid: int, temperature: float = 10_000.0, centred: bool = False, units: int | None = None
) -> torch.Tensor:
    """Positions of a square grid: sine and cosine of the row, then of the column.

    Args:
        dim: channels D, a multiple of 4.
        grid: tokens along a side, G.
        temperature: ratio of the longest to the shortest wave.
        centred: subtract the mean over the grid, so that places differ by more than a common vector.
        units: another grid over the same image, by whose steps places are counted; the grid's own by default.

    Returns:
        (1, G * G, D) float32; token row * G + column.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"{dim} channels cannot hold four equal parts; choose a multiple of 4")
    units = units or grid
    places = (torch.arange(grid, dtype=torch.float64) + 0.5) * units / grid - 0.5
    table = _grid(places, dim, temperature)
    if centred:
        table = table - _grid(torch.arange(units), dim, temperature).mean(0, keepdim=True)
    return table.float()[None]


def text_positions(dim: int) -> torch.Tensor:
    """Positions in a text, (1, 512, D) float32."""
    return _waves(torch.arange(TEXT_POSITIONS), dim, 10_000.0).float()[None]


def _grid(places: torch.Tensor, dim: int, temperature: float) -> torch.Tensor:
    axes = torch.meshgrid(places, places, indexing="ij")
    return torch.cat([_waves(axis.flatten(), dim // 2, temperature) for axis in axes], 1)


def _waves(places: torch.Tensor, dim: int, temperature: float) -> torch.Tensor:
    half = dim // 2
    omega = temperature ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = places.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1)
